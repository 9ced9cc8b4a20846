"""Trained biases and norms are exchanged with Hugging Face PEFT, and have torch's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import OFT, AdapterSpec, Full, LNTuning, LoHa, LoRA
from peft_jax.core import flatten
from peft_jax.hub import load_adapter, save_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SPECS = {
    "all biases": ("bloom", AdapterSpec(method=LoRA(rank=2), bias="all")),
    "biases of two modules": (
        "bloom",
        AdapterSpec(
            method=LoRA(rank=2), target_modules=("dense", "mlp.dense_h_to_4h"), bias="adapted"
        ),
    ),
    "all biases, one layer": (
        "bloom",
        AdapterSpec(method=LoRA(rank=2), layers_to_transform=(1,), bias="all"),
    ),
    "oft": (
        "bloom",
        AdapterSpec(method=OFT(block_size=4), target_modules=("dense",), bias="adapted"),
    ),
    "norms": ("llama", AdapterSpec(method=LNTuning())),
    "some norms": (
        "bloom",
        AdapterSpec(
            method=LNTuning(),
            target_modules=("input_layernorm", "ln_f"),
            modules_to_save=("dense_4h_to_h",),
        ),
    ),
}
CONFIGS = {
    "all biases": (
        "bloom",
        peft.LoraConfig(r=2, target_modules=["query_key_value"], bias="all", task_type="CAUSAL_LM"),
        "all",
    ),
    "biases of one module": (
        "bloom",
        peft.LoraConfig(
            r=2, target_modules=["dense_h_to_4h"], bias="lora_only", task_type="CAUSAL_LM"
        ),
        "adapted",
    ),
    "no biases": (
        "llama",
        peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
        "none",
    ),
    "norms": (
        "bloom",
        peft.LNTuningConfig(target_modules=["input_layernorm", "ln_f"], task_type="CAUSAL_LM"),
        "none",
    ),
}


def theirs(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def assert_same(found, expected, away_from) -> None:
    """Asserts equality up to 1e-5 of the largest logit, and a difference from the base."""
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale
    assert np.abs(found - away_from).max() > 0.05 * scale


@pytest.mark.fast("all biases", "biases of two modules", "some norms")
@pytest.mark.filterwarnings("error:.*missing adapter keys.*")
@pytest.mark.filterwarnings("error:.*[Uu]nexpected.*")
@pytest.mark.parametrize("name", SPECS)
def test_saved_adapters_load_in_peft_and_here(name, base, arbitrary_state, tokens, tmp_path):
    kind, spec = SPECS[name]
    base = base(kind)
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    ours = base.adapted_logits(tokens, spec, state)
    module = peft.PeftModel.from_pretrained(base.copy_of_module(), tmp_path)
    assert_same(ours, theirs(module, tokens), base.logits(tokens))
    own_spec, own = load_adapter(tmp_path, base.model, base.params)
    assert own_spec == spec
    if not spec.layers_to_transform:  # Layers without the adapter are not in the file.
        jax.tree.map(np.testing.assert_array_equal, own, state)
    (tmp_path / "peft_jax_adapter.json").unlink()
    again_spec, again = load_adapter(tmp_path, base.model, base.params)
    assert again_spec.bias == spec.bias
    found = base.adapted_logits(tokens, again_spec, again)
    np.testing.assert_allclose(found, ours, atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_adapters_load(name, base, tokens, tmp_path):
    kind, config, bias = CONFIGS[name]
    base = base(kind)
    module = peft.get_peft_model(base.copy_of_module(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    assert spec.bias == bias
    assert_same(
        base.adapted_logits(tokens, spec, state), theirs(module, tokens), base.logits(tokens)
    )


@pytest.mark.parametrize("name", ["all biases", "norms"])
def test_gradients_agree_with_peft(name, base, tokens):
    kind, config, bias = CONFIGS[name]
    base = base(kind)
    method = LoRA(rank=2, alpha=8.0) if bias == "all" else LNTuning()
    targets = ("query_key_value",) if bias == "all" else ("input_layernorm", "ln_f")
    spec = AdapterSpec(method=method, target_modules=targets, bias=bias)
    state = spec.init(jax.random.key(0), base.params)
    weight = np.random.default_rng(0).normal(size=(*tokens.shape, 37)).astype(np.float32)

    rows = jnp.asarray(tokens, jnp.int32)

    @jax.jit
    def gradient(state):
        return jax.grad(
            lambda trainable: jnp.sum(
                base.model(spec.bind(base.params, state.replace(trainable=trainable)), rows)
                * weight
            )
        )(state.trainable)

    found = flatten(gradient(state))
    module = peft.get_peft_model(base.copy_of_module(), config)
    logits = module(input_ids=torch.tensor(tokens)).logits
    torch.sum(logits * torch.tensor(weight)).backward()
    expected = {
        key.replace(".default", "")
        .replace(".base_layer", "")
        .replace(".ln_tuning_layers", ""): p.grad
        for key, p in module.named_parameters()
        if p.requires_grad and "lora_" not in key
    }
    names = base.model.hf_names()
    compared = 0
    for path in spec.targets(base.params).trained:
        rows = names[path].rows(base.model.config.num_layers)
        parts = [expected[f"base_model.model.{name}"].numpy() for name in rows.values()]
        whole = np.stack(parts) if len(rows) > 1 else parts[0]
        np.testing.assert_allclose(found[path], whole, atol=1e-4 * np.abs(whole).max())
        compared += len(parts)
    assert compared == len(expected)


def test_what_has_no_biases_or_norms_is_rejected(base, arbitrary_state, tmp_path):
    bloom, llama = base("bloom"), base("llama")
    with pytest.raises(ValueError, match="bias is 'all', but the model has no biases"):
        AdapterSpec(method=LoRA(rank=2), bias="all").targets(llama.params)
    with pytest.raises(ValueError, match=r"must be 'none'.*full trains whole modules"):
        AdapterSpec(method=Full(), bias="all").targets(bloom.params)
    with pytest.raises(ValueError, match=r"dense is adapted in some layers only.*bias 'all'"):
        AdapterSpec(
            method=LoRA(rank=2), layers_to_transform=(1,), target_modules=("dense",), bias="adapted"
        ).targets(bloom.params)
    with pytest.raises(ValueError, match=r"self_attention\.dense, which ln_tuning does not train"):
        AdapterSpec(method=LNTuning(), target_modules=("dense",)).targets(bloom.params)
    spec = AdapterSpec(method=LoHa(rank=2), target_modules=("dense",), bias="adapted")
    save_adapter(
        tmp_path, bloom.model, spec, arbitrary_state(spec, bloom.params), base_model_name="base"
    )
    assert not (tmp_path / "adapter_config.json").exists()
