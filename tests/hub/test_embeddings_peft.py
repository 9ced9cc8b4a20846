"""Adapted embeddings and trained tokens are exchanged with PEFT, and have torch's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    AdapterSpec,
    LNTuning,
    LoRA,
    LoRAGA,
    TrainableTokens,
    approximate_by_lora,
    combine_adapters,
    stack_adapters,
)
from peft_jax.core import flatten
from peft_jax.hub import export_merged, load_adapter, save_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-5
TOKENS = (31, 3, 19)
SPECS = {
    "lora": (
        "llama",
        AdapterSpec(
            method=LoRA(rank=2, alpha=3.0),
            target_modules=("q_proj", "embed_tokens", "lm_head"),
            rank_pattern={"embed_tokens": 4},
        ),
    ),
    "tokens": ("llama", AdapterSpec(method=TrainableTokens(token_indices=TOKENS))),
    "tokens, tied": ("llama tied", AdapterSpec(method=TrainableTokens(token_indices=TOKENS))),
    "tokens beside": (
        "llama tied",
        AdapterSpec(
            method=LoRA(rank=2), rank_pattern={"q_proj": 3}, trainable_token_indices=TOKENS
        ),
    ),
}
CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": (
        "llama",
        peft.LoraConfig(
            r=2, target_modules=["v_proj", "embed_tokens"], use_rslora=True, lora_alpha=3, **CAUSAL
        ),
    ),
    "tokens": ("llama", peft.TrainableTokensConfig(token_indices=list(TOKENS), **CAUSAL)),
    "tokens, tied": (
        "llama tied",
        peft.TrainableTokensConfig(token_indices=list(TOKENS), **CAUSAL),
    ),
    "tokens beside": (
        "llama tied",
        peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices=list(TOKENS), **CAUSAL
        ),
    ),
    "tokens by module": (
        "llama",
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": list(TOKENS)},
            **CAUSAL,
        ),
    ),
}


def theirs(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def assert_same(found, expected, away_from) -> None:
    """Asserts equality up to rounding of float32, and a difference from the base."""
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < TOLERANCE * scale
    assert np.abs(found - away_from).max() > 0.01 * scale


def change(module) -> None:
    """Adds noise to what PEFT trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.fast("lora", "tokens, tied")
@pytest.mark.filterwarnings("error:.*missing adapter keys.*")
@pytest.mark.filterwarnings("error:.*[Uu]nexpected.*")
@pytest.mark.parametrize("name", SPECS)
def test_saved_adapters_load_in_peft_and_here(name, base, arbitrary_state, tokens, tmp_path):
    kind, spec = SPECS[name]
    base = base(kind)
    state = arbitrary_state(spec, base.model.abstract_params())
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    ours = base.adapted_logits(tokens, spec, state)
    module = peft.PeftModel.from_pretrained(base.copy_of_module(), tmp_path)
    assert_same(ours, theirs(module, tokens), base.logits(tokens))
    merged = np.asarray(base.model(spec.merge(base.params, state), jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(merged, ours, atol=TOLERANCE * np.abs(ours).max())
    own_spec, own = load_adapter(tmp_path, base.model, base.params)
    assert own_spec == spec
    jax.tree.map(np.testing.assert_array_equal, own, state)
    (tmp_path / "peft_jax_adapter.json").unlink()
    found = base.adapted_logits(tokens, *load_adapter(tmp_path, base.model, base.params))
    np.testing.assert_allclose(found, ours, atol=TOLERANCE * np.abs(ours).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_adapters_load(name, base, tokens, tmp_path):
    kind, config = CONFIGS[name]
    base = base(kind)
    module = peft.get_peft_model(base.copy_of_module(), config)
    change(module)
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    found = base.adapted_logits(tokens, spec, state)
    assert_same(found, theirs(module, tokens), base.logits(tokens))


@pytest.mark.parametrize("name", ["lora", "tokens, tied"])
def test_gradients_agree_with_peft(name, base, tokens, tmp_path):
    kind, config = CONFIGS[name]
    base = base(kind)
    module = peft.get_peft_model(base.copy_of_module(), config)
    change(module)
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    rows = jnp.asarray(tokens, jnp.int32)
    weight = np.random.default_rng(0).normal(size=(*tokens.shape, 37)).astype(np.float32)

    @jax.jit
    def gradient(state):
        def total(trainable):
            bound = spec.bind(base.params, state.replace(trainable=trainable))
            return jnp.sum(base.model(bound, rows) * weight)

        return jax.grad(total)(state.trainable)

    found = flatten(gradient(state)["embed_tokens"]["embedding"])
    logits = module(input_ids=torch.tensor(tokens)).logits
    torch.sum(logits * torch.tensor(weight)).backward()
    expected = {
        key.split("embed_tokens.")[1].removesuffix(".default"): parameter.grad.numpy()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and "embed_tokens." in key
    }
    assert len(expected) == len(found)
    method = spec.targets(base.params).adapted["embed_tokens", "embedding"]
    for array, whole in method.peft_form().restore(expected)[0].items():
        np.testing.assert_allclose(found[(array,)], whole, atol=1e-4 * np.abs(whole).max())


def test_only_the_named_rows_are_trained(base):
    base = base("llama")
    spec = AdapterSpec(method=TrainableTokens(token_indices=TOKENS))
    state = spec.init(jax.random.key(0), base.params)
    table = np.asarray(base.params["embed_tokens"]["embedding"])
    (rows,) = jax.tree.leaves(state.trainable)
    np.testing.assert_array_equal(rows, table[list(TOKENS)])
    moved = state.replace(trainable=jax.tree.map(lambda a: a + 1.0, state.trainable))
    merged = np.asarray(spec.merge(base.params, moved)["embed_tokens"]["embedding"])
    others = np.setdiff1d(np.arange(len(table)), TOKENS)
    np.testing.assert_array_equal(merged[others], table[others])
    np.testing.assert_array_equal(merged[list(TOKENS)], rows + 1.0)


def test_a_tied_head_follows_lora_on_the_embedding(base, arbitrary_state, tokens, tmp_path):
    base = base("llama tied")
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("embed_tokens",))
    state = arbitrary_state(spec, base.params)
    export_merged(tmp_path / "merged", base.model, base.params, spec, state)
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours = base.adapted_logits(tokens, spec, state)
    assert_same(ours, theirs(module, tokens), base.logits(tokens))
    save_adapter(tmp_path / "ours", base.model, spec, state, base_model_name="someone/base")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], **CAUSAL)
    peft.get_peft_model(base.copy_of_module(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"embed_tokens, which config\.json ties to the head"):
        load_adapter(tmp_path / "theirs", base.model, base.params)


def test_functions_over_several_adapters_know_trained_tokens(base, arbitrary_state, tokens):
    base = base("llama")
    spec = AdapterSpec(method=LoRA(rank=2), trainable_token_indices=TOKENS)
    state = arbitrary_state(spec, base.params)
    near = approximate_by_lora(spec, base.params, state, rank=2)
    ours = base.adapted_logits(tokens, spec, state)
    found = base.adapted_logits(tokens, near.spec, near.state)
    np.testing.assert_allclose(found, ours, atol=1e-3 * np.abs(ours).max())
    with pytest.raises(ValueError, match="'one' replaces rows of the embedding"):
        combine_adapters(base.params, {"one": (spec, state)}, {"one": 1.0}, "svd")
    with pytest.raises(ValueError, match="'one' adapts the embedding embed_tokens"):
        stack_adapters(base.params, {"one": (spec, state)})


REJECTED = {
    "boft": (
        {"method": BOFT(block_size=4), "target_modules": ("embed_tokens",)},
        r"embed_tokens, which is an embedding .*boft cannot adapt it",
    ),
    "lora_ga": (
        {"method": LoRAGA(rank=2), "target_modules": ("embed_tokens",)},
        r"lora_ga cannot adapt it",
    ),
    "beyond": (
        {"method": LoRA(rank=2), "trainable_token_indices": (37,)},
        r"has 37, but embed_tokens has the rows 0 to 36",
    ),
    "twice": ({"method": LoRA(rank=2), "trainable_token_indices": (1, 1)}, r"has 1 more than once"),
    "none": ({"method": TrainableTokens()}, r"token_indices is empty"),
    "both": (
        {
            "method": LoRA(rank=2),
            "modules_to_save": ("embed_tokens",),
            "trainable_token_indices": (1,),
        },
        r"rows of embed_tokens, which target_modules or modules_to_save select too",
    ),
    "norms": (
        {"method": LNTuning(), "trainable_token_indices": (1,)},
        r"trainable_token_indices empty, because ln_tuning",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_be_trained_is_rejected(name, base):
    settings, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        AdapterSpec(**settings).targets(base("llama").params)
