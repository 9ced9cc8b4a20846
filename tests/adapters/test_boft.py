"""Tests BOFT against Hugging Face PEFT's layer, and composed against separate factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import BOFT, AdapterSpec, Hybrid
from peft_jax.core import AdaptedKernel, linear


def random_arrays(method: BOFT, shape: tuple[int, int], key: jax.Array) -> dict[str, jax.Array]:
    """Returns trainable arrays away from their initial values."""
    trainable, constant = method.init(key, shape)
    assert constant == {}
    return {
        name: leaf + 0.4 * jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
        for index, (name, leaf) in enumerate(trainable.items())
    }


@pytest.mark.parametrize("block_size", [2, 3, 6])
def test_layer_agrees_with_peft(block_size, key, monkeypatch):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    method = BOFT(block_size=block_size, n_butterfly_factors=1)
    arrays = random_arrays(method, (12, 7), key)
    kernel, x = (jax.random.normal(jax.random.fold_in(key, 9), s) for s in ((12, 7), (5, 12)))
    bias = np.arange(7.0, dtype=np.float32)

    module = torch.nn.Sequential(torch.nn.Linear(12, 7))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor(np.asarray(kernel).T))
        module[0].bias.copy_(torch.tensor(bias))
    config = peft.BOFTConfig(boft_block_size=block_size, target_modules=["0"])
    layer = peft.get_peft_model(module, config).base_model.model[0]
    blocks = np.zeros((1, 12 // block_size, block_size, block_size), np.float32)
    rows, columns = np.triu_indices(block_size, k=1)
    # PEFT uses (R - Rᵀ) / 2 of its stored R.
    blocks[..., rows, columns] = 2 * np.asarray(arrays["r"])
    with torch.no_grad():
        layer.boft_R["default"].copy_(torch.tensor(blocks))
        layer.boft_s["default"].copy_(torch.tensor(np.asarray(arrays["scale"])[:, None]))
        expected = layer(torch.tensor(np.asarray(x))).numpy()
        layer.merge()
        merged = layer.base_layer.weight.numpy().T

    prepared = method.prepare(arrays, {})
    found = linear(x, AdaptedKernel(base=kernel, arrays=prepared, method=method)) + bias
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(method.merge(kernel, prepared), merged, atol=1e-5)


@pytest.mark.parametrize("factors", [1, 2, 4])
def test_composed_and_separate_factors_agree(factors, key, monkeypatch):
    method = BOFT(block_size=4, n_butterfly_factors=factors)
    arrays = random_arrays(method, (64, 5), key)
    kernel, x = (jax.random.normal(jax.random.fold_in(key, 9), s) for s in ((64, 5), (3, 64)))

    @jax.jit
    def both(arrays, kernel, x):
        prepared = method.prepare(arrays, {})
        return method.project(x, kernel, prepared), method.merge(kernel, prepared), prepared

    composed, composed_kernel, prepared = both(arrays, kernel, x)
    assert prepared["blocks"].shape == (
        64 // method.composed_block_size,
        *2 * [4 * 2 ** (factors - 1)],
    )
    monkeypatch.setattr("peft_jax.adapters.boft.MAX_COMPOSED_BLOCK", 1)
    both.clear_cache()
    separate, separate_kernel, prepared = both(arrays, kernel, x)
    assert prepared["factors"].shape == (factors, 16, 4, 4)
    np.testing.assert_allclose(separate, composed, atol=2e-5)
    np.testing.assert_allclose(separate_kernel, composed_kernel, atol=1e-5)
    np.testing.assert_allclose(x @ composed_kernel, composed, atol=5e-5)


def test_only_free_entries_are_trainable():
    method = BOFT(block_size=8, n_butterfly_factors=2)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), (64, 10))[0])
    assert shapes["r"].shape == (2, 8, 28)
    assert shapes["scale"].shape == (10,)


@pytest.mark.parametrize(
    ("settings", "d_in", "message"),
    [
        (
            {"block_size": 8, "n_butterfly_factors": 2},
            100,
            r"divisible by 16.*layers\.q_proj .*100 inputs.*: 2, 10, 50$",
        ),
        (
            {"block_size": 32, "n_butterfly_factors": 1},
            100,
            r"divisible by 32.*: (20, 25, 50, 100|10, 20, 25, 50)$",
        ),
        (
            {"block_size": 8, "n_butterfly_factors": 4},
            100,
            r"divisible by 64.* no block size works.* use fewer",
        ),
        (
            {"block_size": 8, "n_butterfly_factors": 1},
            7,
            r"divisible by 8.*: 7$",
        ),
    ],
)
def test_indivisible_inputs_are_rejected_with_block_sizes_that_work(settings, d_in, message):
    params = {"layers": {"q_proj": {"kernel": jnp.ones((2, d_in, 6))}}}
    with pytest.raises(ValueError, match=message) as error:
        AdapterSpec(method=BOFT(**settings)).targets(params)
    for size in str(error.value).rpartition(": ")[2].split(", "):
        if size.isdigit():
            AdapterSpec(method=BOFT(**settings | {"block_size": int(size)})).targets(params)
    if settings["n_butterfly_factors"] == 2:
        with pytest.raises(ValueError, match=r"boft with block_size 8.*q_proj has 100 inputs"):
            AdapterSpec(method=Hybrid(rank=2, **settings)).targets(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "block_size .* 1"),
        ({"block_size": 3, "n_butterfly_factors": 2}, "block_size .*even.* 2 .* 3"),
        ({"n_butterfly_factors": 0}, "n_butterfly_factors .* 0"),
        ({"dropout": 1.0}, "dropout .*1.0"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        BOFT(**settings)
