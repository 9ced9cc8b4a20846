"""Logits agree with transformers for every variant, with padding and position offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama grouped, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 2}),
    "llama 3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    ),
    "llama yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral without window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2 windowed": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 biased, tied": (
        "Qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "bloom": ("Bloom", {}),
    "bloom 6 heads": ("Bloom", {"hidden_size": 48, "n_head": 6}),
    "bloom residual after norm": ("Bloom", {"apply_residual_connection_post_layernorm": True}),
    "bloom untied": ("Bloom", {"tie_word_embeddings": False}),
}
TOLERANCE = 1e-4


_INDEX, _LENGTHS = np.arange(13)[None, :], np.array([13, 9, 4])[:, None]
MASKS = {
    "whole": np.ones((3, 13), bool),
    "padded left": _INDEX >= 13 - _LENGTHS,
    "padded right": _INDEX < _LENGTHS,
}
# Rotary embeddings depend on position differences only, so a stride shows that they are used.
POSITIONS = {
    "from 0": lambda mask: np.maximum(np.cumsum(mask, axis=1) - 1, 0),
    "with an offset": lambda mask: np.maximum(np.cumsum(mask, axis=1) - 1, 0) + 11,
    "in strides": lambda mask: 3 * np.maximum(np.cumsum(mask, axis=1) - 1, 0) + 2,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant, pair, tokens, relative_error):
    kind, settings = VARIANTS[variant]
    theirs, model, params = pair(kind, **settings)
    forward = jax.jit(model)

    def ours(positions, segment_ids):
        positions, segment_ids = (
            jnp.broadcast_to(jnp.asarray(a, jnp.int32), tokens.shape)
            for a in (positions, segment_ids)
        )
        logits = forward(params, tokens, positions=positions, segment_ids=segment_ids)
        return np.asarray(logits)

    for padding, mask in MASKS.items():
        for name, make_positions in POSITIONS.items():
            if kind == "Bloom" and name == "in strides":
                continue  # transformers computes BLOOM's positions itself.
            positions = make_positions(mask)
            expected = theirs.logits(
                tokens, mask=mask, positions=None if kind == "Bloom" else positions
            )
            found = ours(positions, mask)
            assert relative_error(found[mask], expected[mask]) < TOLERANCE, (padding, name)

    packed_positions = np.r_[0:5, 0:6, 0:2]
    found = ours(packed_positions, np.repeat([1, 2, 0], [5, 6, 2]))
    for segment in (slice(0, 5), slice(5, 11)):
        expected = theirs.logits(tokens[:, segment])
        assert relative_error(found[:, segment], expected) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "mistral", "bloom"])
def test_default_positions_start_at_each_segment(variant, pair, tokens, relative_error):
    kind, settings = VARIANTS[variant]
    theirs, model, params = pair(kind, **settings)
    forward = jax.jit(model)
    assert relative_error(forward(params, tokens), theirs.logits(tokens)) < TOLERANCE
    segment_ids = jnp.asarray([[0] * 2 + [1] * 5 + [2] * 6] * 3, jnp.int32)
    found = forward(params, tokens, segment_ids=segment_ids)[:, 2:7]
    assert relative_error(found, theirs.logits(tokens[:, 2:7])) < TOLERANCE


def test_logits_of_a_pretrained_model_agree_with_transformers(shared_data, relative_error):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from peft_jax.hub import load_model

    folder = shared_data / "models" / "tinystories656K"
    model, params = load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 200))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(model)(params, jnp.asarray(tokens, jnp.int32))
    assert relative_error(found, expected) < TOLERANCE
