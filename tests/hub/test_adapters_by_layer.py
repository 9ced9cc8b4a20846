"""Adapters whose layers differ, in their modules or their ranks, beside Hugging Face PEFT's."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import BOFT, AdapterSpec, AdapterState, DoRA, Hybrid, LoRA, LoRAGA
from peft_jax.adapters.table import count_parameters
from peft_jax.core import flatten, unflatten
from peft_jax.hub import load_adapter, save_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

CONFIGS = {
    "layers": (
        "LoraConfig",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "layer and pattern": (
        "LoraConfig",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "modules": ("LoraConfig", {"target_modules": r".*layers\.0\.self_attn\.q_proj|.*up_proj"}),
    "ranks": (
        "LoraConfig",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, r".*\.1\..*v_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
        },
    ),
    "stabilized ranks": (
        "LoraConfig",
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4},
            "use_rslora": True,
        },
    ),
    "boft": (
        "BOFTConfig",
        {"boft_block_size": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    ),
}
SPECS = {
    "layers": AdapterSpec(LoRA(rank=2), layers_to_transform=(1,)),
    "names": AdapterSpec(
        LoRA(rank=2, alpha=3.0),
        target_modules=("layers.0.self_attn.q_proj", "up_proj", "lm_head"),
        rank_pattern={"layers.1.mlp.up_proj": 4},
        alpha_pattern={r".*layers\.0\.mlp\.up_proj": 5.0},
    ),
    "excluded": AdapterSpec(
        LoRA(rank=2), target_modules=("q_proj",), exclude_modules=("layers.0.self_attn.q_proj",)
    ),
    "lora_ga": AdapterSpec(
        LoRAGA(rank=2),
        target_modules=("q_proj", "layers.1.mlp.up_proj"),
        rank_pattern={"model.layers.0.self_attn.q_proj": 3},
    ),
    "boft": AdapterSpec(
        BOFT(block_size=4, n_butterfly_factors=1), target_modules=r".*\.0\..*(q|v)_proj"
    ),
    "two factors": AdapterSpec(BOFT(block_size=4), layers_to_transform=(0,)),
}


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """Disables PEFT's CUDA extension, for which it would search a compiler at every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def theirs(module, tokens):
    with torch.no_grad():
        return module.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def assert_near(found, wanted, away_from):
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-4 * scale
    assert np.abs(found - away_from).max() > 0.02 * scale


def draw(spec, params):
    """Returns random arrays where the layers have some, and neutral ones elsewhere."""
    rng = np.random.default_rng(0)
    targets = spec.targets(params)
    trees = {"trainable": {}, "constant": {}}
    abstract = spec.abstract(params)
    for name, tree in trees.items():
        for path, leaf in flatten(getattr(abstract, name)).items():
            tree[path] = jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype)
    for path, methods in targets.by_layer.items():
        method, shape = targets.adapted[path], flatten(params)[path].shape[-2:]
        mask = np.array([one is not None for one in methods])
        for tree, neutral in zip(trees.values(), method.neutral(shape), strict=True):
            for name, array in neutral.items():
                kept = mask.reshape(-1, *[1] * array.ndim)
                tree[*path, name] = jnp.where(kept, tree[*path, name], array)
        learned, fixed = (
            {p[len(path)]: x for p, x in tree.items() if p[: len(path)] == path}
            for tree in trees.values()
        )
        for tree, own in zip(
            trees.values(), method.start_layers(learned, fixed, methods), strict=True
        ):
            tree.update({(*path, name): array for name, array in own.items()})
    return AdapterState(**{name: unflatten(tree) for name, tree in trees.items()})


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_peft_load(name, base, tokens, tmp_path):
    base = base("llama")
    kind, settings = CONFIGS[name]
    settings = settings | ({"r": 2, "lora_alpha": 3} if kind == "LoraConfig" else {})
    config = getattr(peft, kind)(**settings, task_type="CAUSAL_LM")
    module = peft.get_peft_model(base.copy_of_module(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    assert_near(
        base.adapted_logits(tokens, spec, state), theirs(module, tokens), base.logits(tokens)
    )
    counted = count_parameters(spec, base.params, state)
    if kind == "LoraConfig":
        assert (counted.trainable, counted.total) == module.get_nb_trainable_parameters()


@pytest.mark.fast("layers", "two factors")
@pytest.mark.parametrize("name", SPECS)
def test_adapters_load_in_peft_and_here(name, base, tokens, tmp_path):
    base, spec = base("llama"), SPECS[name]
    state = draw(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    ours = base.adapted_logits(tokens, spec, state)
    loaded_spec, loaded = load_adapter(tmp_path, base.model, base.params)
    assert loaded_spec == spec
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*[Uu]nexpected.*")
        module = peft.PeftModel.from_pretrained(base.copy_of_module(), tmp_path)
    assert_near(ours, theirs(module, tokens), base.logits(tokens))
    (tmp_path / "peft_jax_adapter.json").unlink()
    found = base.adapted_logits(tokens, *load_adapter(tmp_path, base.model, base.params))
    assert_near(ours, found, base.logits(tokens))


@pytest.mark.fast("lora")
@pytest.mark.parametrize(
    "spec",
    [
        SPECS["names"],
        AdapterSpec(Hybrid(rank=2, block_size=4, gradient_init=False), layers_to_transform=(1,)),
    ],
    ids=lambda spec: spec.method.name,
)
def test_other_layers_start_and_stay_as_the_base(spec, base):
    base = base("llama")
    state = spec.init(jax.random.key(0), base.params)
    state = (
        dataclasses.replace(state, trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
        if spec.method.name == "lora"
        else state
    )
    tokens = jnp.ones((1, 5), jnp.int32)

    def loss(trainable):
        bound = spec.bind(base.params, dataclasses.replace(state, trainable=trainable))
        return jnp.sum(base.model(bound, tokens) ** 2)

    gradients = flatten(jax.jit(jax.grad(loss))(state.trainable))
    merged, plain = flatten(spec.merge(base.params, state)), flatten(base.params)
    targets = spec.targets(base.params)
    seen = 0
    for path, methods in targets.by_layer.items():
        for layer, method in enumerate(methods):
            if method is None:
                seen += 1
                np.testing.assert_allclose(merged[path][layer], plain[path][layer], atol=1e-6)
                own = [g for at, g in gradients.items() if at[: len(path)] == path]
                assert own
                assert not any(np.any(np.asarray(g[layer])) for g in own)
    assert seen


REJECTED = {
    "beyond": ({"layers_to_transform": (0, 2)}, r"has 2, but the model's layers are 0 to 1"),
    "negative": ({"layers_to_transform": (-1,)}, r"layers_to_transform has -1"),
    "nothing": (
        {"layers_to_transform": (0,), "target_modules": ("layers.1.self_attn.q_proj",)},
        "leaves nothing to adapt",
    ),
    "name": (
        {"target_modules": ("layers.7.self_attn.q_proj",)},
        r"'layers\.7\.self_attn\.q_proj', which matches no module; the model's layers are 0 to 1",
    ),
    "pattern": (
        {"target_modules": r".*layers\.7\..*"},
        "matches no module; the model's layers are 0 to 1",
    ),
    "rank": ({"rank_pattern": {"layers.7.mlp.up_proj": 2}}, "matches none of the adapted modules"),
    "method": (
        {
            "method": Hybrid(rank=2, block_size=4),
            "rank_pattern": {"layers.0.self_attn.q_proj": 1},
        },
        "hybrid has the same settings in all layers",
    ),
    "dora": ({"method": DoRA(rank=2), "layers_to_transform": (0,)}, "dora needs the same settings"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_there_is_not_is_rejected_by_name(name, base):
    settings, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        AdapterSpec(**{"method": LoRA(rank=2), **settings}).targets(base("llama").params)


def test_layers_of_peft_that_the_model_does_not_have_are_rejected(base, tmp_path):
    base = base("llama")
    spec = SPECS["layers"]
    save_adapter(tmp_path, base.model, spec, draw(spec, base.params), "someone/base")
    (tmp_path / "peft_jax_adapter.json").unlink()
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_to_transform": [1, 9]}))
    with pytest.raises(ValueError, match=r"layers_to_transform = \[1, 9\].*0 to 1, without 9"):
        load_adapter(tmp_path, base.model, base.params)
