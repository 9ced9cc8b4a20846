"""Tests products of integers over a kernel's sharded rows against exact algebra."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core import linear, quantize
from peft_jax.core.integer_products import partition_integers
from peft_jax.parallel import MeshSettings, integer_row_product, make_mesh, on_mesh

BATCH, TOKENS, MLP, EMBED = 4, 8, 32, 24
AXES = ("mlp", "embed")


def rounded(x):
    step = np.abs(np.asarray(x, np.float32)).max(axis=-1, keepdims=True) / np.float32(127)
    return np.round(np.asarray(x, np.float64) / step), step.astype(np.float64)


def multiply(x, q, dy):
    with partition_integers(lambda x, q: integer_row_product(x, q, AXES)):
        y, pull_back = jax.vjp(lambda x: linear(x, q), x)
    return y, pull_back(dy)[0]


@pytest.mark.parametrize("tokens", [TOKENS, 1], ids=["scattered", "summed"])
def test_each_device_rounds_its_own_features(tokens):
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, sequence=2, tensor=2))
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q = quantize(normal(MLP, EMBED), "w8a8g8")
    # The two devices' features are of different size.
    x = normal(BATCH, tokens, MLP) * jnp.repeat(jnp.array([1.0, 9.0]), MLP // 2)
    dy = normal(BATCH, tokens, EMBED)
    with on_mesh(mesh):
        compiled = jax.jit(multiply).lower(x, q, dy).compile()
    y, dx = compiled(x, q, dy)

    integers, scale = (np.asarray(one, np.float64) for one in (q.qvalue, q.scale[0]))
    parts = zip(np.split(x, 2, axis=-1), np.split(integers, 2), strict=True)
    expected = sum(
        values @ own * step for (values, step), own in ((rounded(p), o) for p, o in parts)
    )
    np.testing.assert_allclose(y, expected * scale, rtol=1e-5, atol=1e-4)
    values, step = rounded(np.asarray(dy) * np.asarray(q.scale[0]))
    np.testing.assert_allclose(dx, values @ integers.T * step, rtol=1e-5, atol=1e-4)

    text = compiled.as_text()
    sent = re.findall(r"(\w+)\[[\d,]*\]\S* (?:all-reduce|reduce-scatter)\(", text)
    assert sent
    assert "s32" not in sent


def test_whole_rows_are_left_to_the_compiler():
    x, q = jnp.ones((BATCH, TOKENS, MLP)), quantize(jnp.ones((MLP, EMBED)), "w8a8")
    assert integer_row_product(x, q, AXES) is None
    with on_mesh(make_mesh(MeshSettings(data=1, fsdp=8))):
        assert integer_row_product(x, q, AXES) is None
