"""Tests the starts from the inputs and from one step of the gradient against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import EVA, AdapterSpec, LoRAOne, input_factors
from peft_jax.core import linear
from peft_jax.models import quantize_params

PATH = ("proj", "kernel")


class Loss:
    """Squared outputs of one kernel; inputs [rows, positions, d_in] of which some count."""

    def __call__(self, params, batch):
        x, _ = batch
        return jnp.sum(linear(x, params["proj"]["kernel"]) ** 2)

    def counted(self, batch):
        return batch[1]


def make_inputs(rng, d_in, *, ratio, count=2):
    """Returns batches of inputs with a large mean and variances that fall by a ratio."""
    basis = np.linalg.qr(rng.normal(size=(d_in, d_in)))[0]
    spread = ratio ** np.arange(d_in)
    return [
        (
            (rng.normal(size=(8, 40, d_in)) * spread @ basis.T + 3.0).astype(np.float32),
            rng.random((8, 40)) < 0.7,
        )
        for _ in range(count)
    ]


def exact_components(batches):
    """Returns the components, variances and total variance of the inputs that count."""
    rows = np.concatenate([x[counted] for x, counted in batches]).astype(np.float64)
    centered = rows - rows.mean(axis=0)
    _, s, vt = np.linalg.svd(centered, full_matrices=False)
    return vt.T, s**2 / (len(rows) - 1), np.sum(centered**2) / (len(rows) - 1)


def sine_of_largest_angle(found, v):
    """Returns the sine of the largest angle between two spans of orthonormal columns."""
    return np.linalg.norm(found - v @ (v.T @ np.asarray(found, np.float64)), 2)


def check(found, batches, rank, *, sine, value):
    v, variance, total = exact_components(batches)
    assert sine_of_largest_angle(found.v, v[:, :rank]) < sine
    np.testing.assert_allclose(found.variance, variance[:rank], rtol=value)
    np.testing.assert_allclose(found.total, total, rtol=1e-4)
    np.testing.assert_allclose(found.v.T @ found.v, np.eye(rank), atol=1e-5)


# As wide as the kernel, the sketch is exact.
@pytest.mark.parametrize(("d_in", "sine", "value"), [(16, 1e-4, 1e-3), (96, 2e-2, 2e-2)])
def test_components_agree_with_float64(d_in, sine, value, key):
    rng = np.random.default_rng(0)
    batches = make_inputs(rng, d_in, ratio=0.8)
    params = {"proj": {"kernel": jnp.asarray(rng.normal(size=(d_in, 6)), jnp.float32)}}
    found = input_factors(Loss(), params, {PATH: 5}, batches, key)[PATH]
    check(found, batches, 5, sine=sine, value=value)


def test_more_passes_improve_the_components(key):
    rng = np.random.default_rng(0)
    batches = make_inputs(rng, 96, ratio=0.9)
    params = {"proj": {"kernel": jnp.asarray(rng.normal(size=(96, 6)), jnp.float32)}}
    v, _, _ = exact_components(batches)
    one, four = (
        sine_of_largest_angle(
            input_factors(Loss(), params, {PATH: 5}, batches, key, passes=passes)[PATH].v,
            v[:, :5],
        )
        for passes in (1, 4)
    )
    assert four < 0.02 < one < 0.9


def test_components_over_a_quantized_base(key):
    rng = np.random.default_rng(0)
    batches = make_inputs(rng, 16, ratio=0.7)
    params = {"proj": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}}
    found = input_factors(Loss(), quantize_params(params, "nf4"), {PATH: 4}, batches, key)[PATH]
    check(found, batches, 4, sine=1e-4, value=1e-3)


def test_components_on_a_mesh_agree_with_one_device(key):
    rng = np.random.default_rng(0)
    batches = make_inputs(rng, 16, ratio=0.7)
    kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))

    def place(x, *spec):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    placed = [(place(x, "data"), place(counted, "data")) for x, counted in batches]
    params = {"proj": {"kernel": place(kernel, "fsdp", None)}}
    found = input_factors(Loss(), params, {PATH: 4}, placed, key)[PATH]
    assert found.v.sharding.spec[0] == "fsdp"
    check(found, batches, 4, sine=1e-4, value=1e-3)


def test_inputs_without_variance_are_rejected(key):
    params = {"proj": {"kernel": jnp.ones((8, 4))}}
    nothing = (np.ones((2, 3, 8), np.float32), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"inputs of proj\.kernel must be finite and vary"):
        input_factors(Loss(), params, {PATH: 2}, [nothing], key)
    with pytest.raises(ValueError, match="batches is empty"):
        input_factors(Loss(), params, {PATH: 2}, [], key)
    with pytest.raises(ValueError, match=r"rank is 9.*eva.*at most 8"):
        AdapterSpec(method=EVA(rank=9), target_modules=("proj",)).targets(params)


def test_one_step_of_the_gradient_agrees_with_float64(key):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 9, 12))
    target = rng.normal(size=(4, 9, 10))
    kernel = rng.normal(size=(12, 10))

    def loss(params, batch):
        inputs, outputs = batch
        return jnp.sum((linear(inputs, params["proj"]["kernel"]) - outputs) ** 2)

    params = {"proj": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    method = LoRAOne(rank=3, alpha=5.0, gamma=50.0)
    spec = AdapterSpec(method=method, target_modules=("proj",))
    batch = (jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.float32))
    state = spec.init(key, params, loss_fn=loss, batches=[batch])
    merged = spec.merge(params, state)["proj"]["kernel"]
    u, s, vt = np.linalg.svd(2 * np.einsum("bti,bto->io", x, x @ kernel - target))
    step = 5.0 / np.sqrt(3) / 50.0 * (u[:, :3] * s[:3] / s[0]) @ vt[:3]
    np.testing.assert_allclose(merged, kernel - step, atol=1e-5)
    a, b = (np.asarray(state.trainable["proj"]["kernel"][name]) for name in ("a", "b"))
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-6)
    assert jax.tree.leaves(state.constant) == []
