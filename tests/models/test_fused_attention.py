"""The fused kernel is used where supported and, on a GPU, agrees with dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.models import ExecutionSettings, attention, build_model
from peft_jax.models.attention import dense_attention, make_attention
from peft_jax.models.attention_layout import AttentionLayout
from peft_jax.models.fused_attention import fused_attention, why_not_fused

SIZES = {"platform": "gpu", "dtype": jnp.dtype("bfloat16"), "head_dim": 64}
SEGMENTS = jnp.asarray(np.repeat([[1, 1, 2, 0]], 16, axis=1))
ON_GPU = jax.default_backend() == "gpu"


def reason(layout, **changes):
    sizes = SIZES | {"tokens": 64, "keys": 64} | changes
    return why_not_fused(layout, **sizes)


@pytest.mark.parametrize(
    "layout",
    [
        AttentionLayout.causal(None, None),
        AttentionLayout.causal(SEGMENTS, None),
        AttentionLayout.causal(SEGMENTS, None, window=7),
        AttentionLayout.bidirectional(SEGMENTS),
    ],
)
def test_supported_layouts_have_no_reason_against_the_kernel(layout):
    assert reason(layout) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "tpu"}, "tpu"),
        ({"dtype": jnp.dtype("float32")}, "float32"),
        ({"head_dim": 136}, "136"),
        ({"head_dim": 12}, "12"),
        ({"keys": 128}, "cache"),
        ({"tokens": 16384, "keys": 16384}, "8192"),
        ({"tokens": 63, "keys": 63}, "63"),
    ],
)
def test_unsupported_cases_return_a_reason(changes, message):
    assert message in reason(AttentionLayout.causal(SEGMENTS, None), **changes)


def test_rows_of_one_segment_need_no_mask():
    layout = AttentionLayout.causal(SEGMENTS, None, packed=False)
    assert reason(layout, tokens=32768, keys=32768) is None


def test_a_model_with_unsupported_fused_attention_raises():
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    model = build_model(config, ExecutionSettings(attention="fused"))
    params = model.init_params(jax.random.key(0))
    if ON_GPU:
        pytest.skip("supported on a GPU in 16 bits")
    with pytest.raises(ValueError, match=r"attention='fused'.*GPU"):
        model(params, jnp.ones((1, 8), jnp.int32))


@pytest.mark.skipif(not ON_GPU, reason="cuDNN needs a GPU")
@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (AttentionLayout.causal(None, None), 250),
        (AttentionLayout.causal(None, None, window=50), 250),
        (AttentionLayout.causal(jnp.repeat(SEGMENTS, 4, axis=0).repeat(4, axis=1), None), 256),
        (AttentionLayout.bidirectional(jnp.repeat(SEGMENTS, 4, axis=0).repeat(4, axis=1)), 256),
    ],
    ids=["causal", "window", "segments", "bidirectional"],
)
def test_outputs_and_gradients_agree_with_dense_attention(layout, tokens):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(4, tokens, 2, 3, 64)) / 8, jnp.bfloat16)
    key, value = (jnp.asarray(rng.normal(size=(4, tokens, 2, 64)), jnp.bfloat16) for _ in range(2))
    direction = jnp.asarray(rng.normal(size=query.shape), jnp.bfloat16)

    def both(make, arrays, direction):
        out, pull = jax.vjp(jax.jit(make(layout, tokens=tokens, keys=tokens)), *arrays)
        return out, *pull(direction)

    found = both(fused_attention, (query, key, value), direction)
    exact = [a.astype(jnp.float32) for a in (query, key, value)]
    with jax.default_matmul_precision("highest"):
        expected = both(dense_attention, exact, direction.astype(jnp.float32))
    for one, other in zip(found, expected, strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * scale)


def test_the_implementation_is_logged_once_with_its_reason(caplog):
    sizes = {"tokens": 7, "keys": 7, "head_dim": 8, "execution": ExecutionSettings()}
    attention._log_once.cache_clear()  # Another test may have logged the same.
    with caplog.at_level("INFO", logger="peft_jax.models.attention"):
        for _ in range(2):
            make_attention(AttentionLayout.causal(None, None), **sizes)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("attention of 7 tokens to 7 keys: dense")
