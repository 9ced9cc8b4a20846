"""Merging compiled with `jax.jit`, for kernels of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import BOFT, AdapterSpec, Full, LoRA
from peft_jax.core import quantize


@pytest.fixture
def params(key):
    kernels = jax.random.normal(key, (3, 64, 16))
    return {
        "layers": {"up": {"kernel": kernels}, "down": {"kernel": quantize(kernels, "int8")}},
        "head": {"kernel": kernels[0]},
    }


def noisy(state, key):
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.fast("boft")
@pytest.mark.parametrize("method", [LoRA(rank=2), BOFT(block_size=4)], ids=lambda m: m.name)
def test_merging_compiles(method, params, key):
    spec = AdapterSpec(method)
    state = noisy(spec.init(key, params), key)
    compiled, eager = jax.jit(spec.merge)(params, state), spec.merge(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), compiled, eager)
    assert float(jnp.abs(eager["head"]["kernel"] - params["head"]["kernel"]).max()) > 0.01


def test_a_full_model_merges_compiled(params, key):
    plain = {"head": params["head"]}
    spec = AdapterSpec(Full())
    state = spec.init(key, plain)
    merged = jax.jit(spec.merge)(spec.frozen(plain), state)
    np.testing.assert_array_equal(merged["head"]["kernel"], plain["head"]["kernel"])


def test_values_are_checked_only_where_they_are_known(params, key):
    spec = AdapterSpec(LoRA(rank=2), target_modules=("head",))
    state = spec.init(key, params)
    state.trainable["head"]["kernel"]["b"] += jnp.nan
    with pytest.raises(ValueError, match="head merges to values that are not finite"):
        spec.merge(params, state)
    assert np.isnan(jax.jit(spec.merge)(params, state)["head"]["kernel"]).all()
