"""Prompt tuning and prefix tuning compute, learn and are stored as in Hugging Face PEFT."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.adapters import AdapterSpec, PrefixTuning, PromptTuning, PTuning
from peft_jax.core import VIRTUAL
from peft_jax.data import Batch
from peft_jax.generation import GenerationSettings, generate
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.training import Trainer

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

COUNT = 3
TOLERANCE = 1e-5
CONFIGS = {
    "prompt": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected prefix": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 12},
    ),
}
METHODS = {
    "p-tuning": PTuning(num_virtual_tokens=COUNT, hidden_size=12),
    "prompt": PromptTuning(num_virtual_tokens=COUNT),
    "prefix": PrefixTuning(num_virtual_tokens=COUNT),
    "projected prefix": PrefixTuning(num_virtual_tokens=COUNT, projection=12),
}
OTHERS = ("bloom", "gpt2", "gemma2", "phi3", "granite")
KINDS = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


def wrap(base, name):
    """Returns PEFT's module with virtual tokens of unit size."""
    config_class, settings = CONFIGS[name]
    config = getattr(peft, config_class)(
        num_virtual_tokens=COUNT, task_type="CAUSAL_LM", **settings
    )
    torch.manual_seed(1)
    return peft.get_peft_model(base.copy_of_module(), config)


def theirs(module, tokens) -> np.ndarray:
    """Returns the logits of tokens, without those of virtual tokens."""
    with torch.no_grad():
        given = {"attention_mask": torch.ones(tokens.shape)}
        logits = module.eval()(input_ids=torch.tensor(tokens), **given).logits.numpy()
    return logits[:, logits.shape[1] - tokens.shape[1] :]


def assert_same(found, expected, away_from) -> None:
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < TOLERANCE * scale
    assert np.abs(found - away_from).max() > 0.05 * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_files_load_and_compute_the_same(kind, name, base, tokens, tmp_path):
    base = base(kind)
    module = wrap(base, name)
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    assert spec.method.num_virtual_tokens == COUNT
    found = base.adapted_logits(tokens, spec, state)
    assert_same(found, theirs(module, tokens), base.logits(tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_files_written_here_load_in_peft(kind, name, base, arbitrary_state, tokens, tmp_path):
    base, spec = base(kind), AdapterSpec(METHODS[name])
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    ours = base.adapted_logits(tokens, spec, state)
    module = peft.PeftModel.from_pretrained(base.copy_of_module(), tmp_path)
    assert_same(ours, theirs(module, tokens), base.logits(tokens))
    again, restored = load_adapter(tmp_path, base.model, base.params)
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, restored.trainable, state.trainable)
    (tmp_path / "peft_jax_adapter.json").unlink()
    found = base.adapted_logits(tokens, *load_adapter(tmp_path, base.model, base.params))
    np.testing.assert_allclose(found, ours, atol=TOLERANCE * np.abs(ours).max())


@pytest.mark.fast("prefix-llama")
@pytest.mark.parametrize("kind", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_step_agrees_with_peft(kind, name, base, tokens, tmp_path):
    base = base(kind)
    module = wrap(base, name)
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)

    trainer = Trainer(base.model, spec, optax.sgd(0.5))
    training = trainer.initialize(base.params, adapter=state)
    rows = np.repeat(tokens, 4, axis=0)  # one for each device
    metrics = trainer.step(training, Batch.from_tokens(rows))

    # PEFT's last virtual token predicts the first token, which is no target here.
    labels = torch.tensor(tokens)
    labels[:, 0] = -100
    mask = torch.ones(tokens.shape)
    loss = module(input_ids=torch.tensor(tokens), attention_mask=mask, labels=labels).loss
    loss.backward()
    (parameter,) = (one for one in module.parameters() if one.requires_grad)
    with torch.no_grad():
        parameter -= 0.5 * parameter.grad
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    tensor = parameter.detach().numpy()
    if name == "prompt":
        expected = {"embeddings": tensor}
    else:
        layers, width = base.model.num_layers, tensor.shape[1] // (2 * base.model.num_layers)
        keys_values = tensor.reshape(COUNT, layers, 2, width).transpose(2, 1, 0, 3)
        expected = dict(zip(("keys", "values"), keys_values, strict=True))
    for array, value in training.adapter.trainable[VIRTUAL].items():
        assert np.abs(value - state.trainable[VIRTUAL][array]).max() > 1e-4
        np.testing.assert_allclose(value, expected[array], atol=1e-5)


@pytest.mark.fast("prefix-llama")
@pytest.mark.parametrize("kind", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_greedy_texts_agree_with_peft(kind, name, base, tmp_path):
    base = base(kind)
    module = wrap(base, name)
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    prompts = [[5, 9, 11, 2, 30, 8], [7, 3]]
    settings = GenerationSettings(max_new_tokens=12, eos_ids=())
    expected = []
    for prompt in prompts:
        # By forward passes, from which `generate` differs in PEFT 0.21 with transformers 5.24.
        row = list(prompt)
        while len(row) < len(prompt) + 12:
            row.append(int(theirs(module, np.array([row]))[0, -1].argmax()))
        expected.append(row[len(prompt) :])
    found = generate(base.model, spec.bind(base.params, state), prompts, settings)
    assert [one.tokens.tolist() for one in found.completions] == expected
    plain = generate(base.model, base.params, prompts, settings)
    assert [one.tokens.tolist() for one in plain.completions] != expected


def test_the_network_of_p_tuning_is_peft_s(base, tokens, tmp_path):
    base = base("llama")
    module = wrap(base, "p-tuning")
    network = module.prompt_encoder["default"]
    layers = [layer for layer in network.mlp_head if hasattr(layer, "weight")]
    arrays = {"embedding": network.embedding.weight}
    for name, layer in zip(("first", "second", "third"), layers, strict=True):
        arrays |= {name: layer.weight.T, f"{name}_bias": layer.bias}
    arrays = {name: jnp.asarray(value.detach().numpy()) for name, value in arrays.items()}
    spec = AdapterSpec(METHODS["p-tuning"])
    abstract = spec.abstract(base.params).trainable[VIRTUAL]
    assert jax.tree.map(jnp.shape, arrays) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    found = METHODS["p-tuning"].virtual_tokens(arrays).embeddings
    expected = module.get_prompt_embedding_to_save("default").numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_damaged_and_foreign_files_are_rejected(base, tmp_path):
    base = base("llama")
    wrap(base, "prefix").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"num_virtual_tokens": 4}, r"prompt_embeddings has shape \[3, 32\].*\[4, 32\]"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2"),
        ({"peft_type": "PREFIX", "encoder_hidden_size": 8}, r"peft_type = 'PREFIX'"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, base.model, base.params)
    config["num_virtual_tokens"] = None
    file.write_text(json.dumps(config))
    spec, state = load_adapter(tmp_path, base.model, base.params)
    assert spec.method.num_virtual_tokens == COUNT
    save_adapter(tmp_path / "own", base.model, spec, state, base_model_name="x")
    own = tmp_path / "own" / "adapter_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match="num_virtual_tokens is 4, not 3"):
        load_adapter(tmp_path / "own", base.model, base.params)


@pytest.mark.parametrize("name", ["p-tuning", "projected prefix"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_is_restored_bit_for_bit(dtype, name, base, arbitrary_state, tmp_path):
    base = base("llama")
    spec = dataclasses.replace(AdapterSpec(METHODS[name]), dtype=dtype)
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    assert (tmp_path / "peft_jax_adapter.safetensors").is_file()
    _, restored = load_adapter(tmp_path, base.model, base.params)
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(
            jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32)
        ),
        restored,
        state,
    )
