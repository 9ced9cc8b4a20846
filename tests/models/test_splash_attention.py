"""Tests the TPU's attention kernel, interpreted, against dense attention in float32."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.cost import find_topology
from peft_jax.models import splash_attention
from peft_jax.models.attention import dense_attention, make_attention
from peft_jax.models.attention_layout import AttentionLayout, alibi_slopes
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.splash_attention import why_not_splash
from peft_jax.parallel import MeshSettings, make_mesh, on_mesh

TOKENS = 384
SEGMENTS = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 3], [1, 2, 2, 3, 0, 0]], TOKENS // 6, axis=1))
LAYOUTS = {
    "causal": AttentionLayout.causal(None, None),
    "window": AttentionLayout.causal(None, None, window=150),
    "wide window": AttentionLayout.causal(None, None, window=500),
    "packed": AttentionLayout.causal(SEGMENTS, None, window=70, score_cap=3.0),
    "one segment": AttentionLayout.causal((SEGMENTS > 0).astype(jnp.int32), None, packed=False),
    "sinks": AttentionLayout.causal(SEGMENTS, None, window=70, sinks=True),
    "bidirectional": AttentionLayout.bidirectional(SEGMENTS),
    "bidirectional window": AttentionLayout.bidirectional(SEGMENTS, window=40),
}


@pytest.mark.fast("packed", "sinks")
@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_agree_with_dense_attention(name, monkeypatch):
    monkeypatch.setattr(splash_attention, "_LARGEST_BLOCK", 128)
    splash_attention._block_sizes.cache_clear()
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, TOKENS, 2, 2, 64)) / 8, jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, TOKENS, 2, 64)), jnp.float32) for _ in range(2))
    sinks = [jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)] if layout.sinks else []
    # Without segments, padding attends too; its outputs are not used.
    used = jnp.ones((2, TOKENS)) if layout.query_segments is None else SEGMENTS > 0
    used = used.astype(jnp.float32)[..., None, None, None]
    direction = jnp.asarray(rng.normal(size=query.shape), jnp.float32) * used

    def both(attend):
        out, pull = jax.vjp(jax.jit(attend), query, key, value, *sinks)
        return out * used, *pull(direction)

    found = both(
        splash_attention.splash_attention(layout, tokens=TOKENS, keys=TOKENS, interpret=True)
    )
    expected = both(dense_attention(layout, tokens=TOKENS, keys=TOKENS))
    splash_attention._block_sizes.cache_clear()
    for one, other in zip(found, expected, strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, atol=2e-5 * scale)


def test_what_the_kernel_cannot_do_is_named():
    layout, positions = AttentionLayout.causal(None, None), jnp.zeros((1, 256), jnp.int32)
    sizes = {"dtype": jnp.dtype("bfloat16"), "head_dim": 128, "tokens": 256, "keys": 256}
    assert why_not_splash(layout, **sizes) is None
    slopes = jnp.asarray(alibi_slopes(4).reshape(2, 2))
    assert "ALiBi" in why_not_splash(layout.with_alibi(slopes, positions, None), **sizes)
    for changes, reason in (
        ({"dtype": jnp.dtype("float32")}, "float32"),
        ({"head_dim": 80}, "80"),
        ({"tokens": 8}, "cache"),
        ({"tokens": 200, "keys": 200}, "200"),
    ):
        assert reason in why_not_splash(layout, **{**sizes, **changes})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("chip", "has_sinks"), [("v5p:2x2x1", False), ("v6e:2x2", True)])
def test_a_tpu_takes_it_by_default(chip, has_sinks):
    """Each device computes its rows and heads; no array of scores [tokens, tokens] remains."""
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=2), find_topology(chip).devices)
    settings = ExecutionSettings(compute_dtype="bfloat16")

    def loss(query, key, value, segments, *sinks):
        layout = AttentionLayout.causal(segments, None, sinks=has_sinks)
        attend = make_attention(layout, tokens=2048, keys=2048, head_dim=128, execution=settings)
        return jnp.sum(attend(query, key, value, *sinks).astype(jnp.float32) ** 2)

    with on_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("fsdp"))
        heads = jax.NamedSharding(mesh, jax.P("fsdp", None, "tensor"))
        shapes = (
            jax.ShapeDtypeStruct((4, 2048, 4, 2, 128), jnp.bfloat16, sharding=heads),
            *[jax.ShapeDtypeStruct((4, 2048, 4, 128), jnp.bfloat16, sharding=heads)] * 2,
            jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=rows),
            *[jax.ShapeDtypeStruct((4, 2), jnp.float32)] * has_sinks,
        )
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert not re.search(r"\[[\d,]*2048,2048\]", text)
