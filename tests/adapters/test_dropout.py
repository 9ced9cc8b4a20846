"""Tests that dropout is off without a key, unbiased, and determined by the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    OFT,
    AdapterSpec,
    DoRA,
    HiRA,
    Hybrid,
    LoKr,
    LoRA,
    LoRAGA,
    MiSS,
    RandLora,
    VeRA,
)
from peft_jax.core import linear

RATE = 0.25
LAYERS, D_IN, D_OUT = 2, 16, 6
METHODS = {
    "lora": (LoRA(rank=3), LoRA(rank=3, dropout=RATE)),
    "dora": (DoRA(rank=3), DoRA(rank=3, dropout=RATE)),
    "lora_ga": (LoRAGA(rank=3), LoRAGA(rank=3, dropout=RATE)),
    "lokr": (LoKr(rank=1), LoKr(rank=1, dropout=RATE)),
    "randlora": (RandLora(rank=3), RandLora(rank=3, dropout=RATE)),
    "hira": (HiRA(rank=3), HiRA(rank=3, dropout=RATE)),
    "vera": (VeRA(rank=3), VeRA(rank=3, dropout=RATE)),
    "miss": (MiSS(rank=3), MiSS(rank=3, dropout=RATE)),
    "oft": (OFT(block_size=4), OFT(block_size=4, dropout=RATE)),
    "boft": (BOFT(block_size=4), BOFT(block_size=4, dropout=RATE)),
    "hybrid": (
        Hybrid(rank=3, block_size=4),
        Hybrid(rank=3, block_size=4, dropout=RATE, rotation_dropout=RATE),
    ),
}


@pytest.fixture(scope="module")
def params():
    return {
        "layers": {
            "q_proj": {"kernel": jax.random.normal(jax.random.key(1), (LAYERS, D_IN, D_OUT))}
        }
    }


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (40, D_IN))


def loss(params, x):
    return sum(jnp.sum(jnp.tanh(linear(x, kernel))) for kernel in layers(params))


def layers(params):
    kernel = params["layers"]["q_proj"]["kernel"]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], kernel) for i in range(LAYERS)]


class Adapted:
    """A method with dropout, with an initial and a perturbed state."""

    def __init__(self, name, params, x):
        self.plain, self.spec = (AdapterSpec(method=method) for method in METHODS[name])
        self.params, self.x = params, x
        self.start = self.spec.init(jax.random.key(3), params, loss_fn=loss, batches=[x])
        moved = jax.tree.map(
            lambda leaf: leaf + 0.2 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape),
            self.start.trainable,
        )
        self.moved = self.start.replace(trainable=moved)
        self.outputs = jax.jit(self._outputs, static_argnames="spec_name")

    def _outputs(self, state, key=None, *, spec_name="spec"):
        bound = getattr(self, spec_name).bind(self.params, state, dropout_key=key)
        return jnp.stack([linear(self.x, kernel) for kernel in layers(bound)])


@pytest.fixture(scope="module", params=METHODS)
def adapted(request, params, x):
    return Adapted(request.param, params, x)


@pytest.mark.fast("lora", "dora", "vera", "boft", "hybrid")
def test_dropout_is_off_without_a_key(adapted):
    expected = adapted.outputs(adapted.moved, spec_name="plain")
    np.testing.assert_array_equal(adapted.outputs(adapted.moved), expected)


def test_key_has_no_effect_without_dropout(adapted, key):
    expected = adapted.outputs(adapted.moved, spec_name="plain")
    found = adapted.outputs(adapted.moved, key, spec_name="plain")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_key_determines_the_dropped_values(adapted, key):
    once = adapted.outputs(adapted.moved, key)
    np.testing.assert_array_equal(adapted.outputs(adapted.moved, key), once)
    assert not np.allclose(adapted.outputs(adapted.moved, jax.random.fold_in(key, 1)), once)


@pytest.mark.fast("lora", "dora", "vera", "boft", "hybrid")
def test_layers_drop_different_values(adapted, key, params):
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * LAYERS), (params, adapted.moved))
    bound = adapted.spec.bind(*same, dropout_key=key)
    one, other = (linear(adapted.x, kernel) for kernel in layers(bound))
    assert not np.allclose(one, other)


def test_initial_adapter_equals_the_base_with_dropout(adapted, key):
    base = jnp.stack([linear(adapted.x, kernel) for kernel in layers(adapted.params)])
    found = adapted.outputs(adapted.start, key)
    np.testing.assert_allclose(found, base, atol=1e-5 * float(jnp.abs(base).max()))


@pytest.mark.parametrize("name", ["lora", "lora_ga"])
def test_dropout_preserves_the_expectation(name, params, x, key):
    adapted = Adapted(name, params, x)
    keys = jax.random.split(key, 4000)
    mean = jax.jit(
        lambda keys: jax.lax.map(lambda k: adapted._outputs(adapted.moved, k), keys).mean(axis=0)
    )(keys)
    expected = adapted.outputs(adapted.moved)
    base = jnp.stack([linear(x, kernel) for kernel in layers(params)])
    # The standard deviation of a draw is the size of the adapter's own term times √(p / (1 - p)).
    size = float(jnp.abs(expected - base).max())
    deviation = size * np.sqrt(RATE / (1 - RATE) / len(keys))
    assert float(jnp.abs(mean - expected).max()) < 6 * deviation
    assert size > 20 * deviation


def test_boft_dropout_is_the_share_of_dropped_blocks(key):
    method = BOFT(block_size=2, n_butterfly_factors=1, dropout=RATE)
    r = jnp.ones((1, 4000, 1))
    blocks = method.prepare({"r": r, "scale": jnp.ones(3)}, {}, dropout_key=key)["blocks"]
    dropped = np.mean(np.all(np.asarray(blocks) == np.eye(2), axis=(-1, -2)))
    assert abs(dropped - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / 4000)


def test_lora_dropout_is_the_share_of_dropped_inputs(key):
    method = LoRA(rank=8, alpha=8.0, dropout=RATE)
    arrays = {"a": jnp.eye(8), "b": jnp.eye(8)}
    y = np.asarray(method.low_rank(jnp.ones((1000, 8)), arrays, dropout_key=key))
    assert set(np.unique(y)) == {np.float32(0.0), np.float32(1 / (1 - RATE))}
    assert abs(np.mean(y == 0) - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / y.size)
