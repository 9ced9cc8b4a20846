"""LoftQ's start is the best low-rank correction of the error of quantized kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, LoftQ, LoRA
from peft_jax.core import dequantize, flatten
from peft_jax.models import quantize_params

LAYERS, D_IN, D_OUT, RANK = 2, 128, 48, 4
PATH = ("layers", "up_proj", "kernel")


@pytest.fixture(scope="module")
def originals():
    keys = jax.random.split(jax.random.key(1))
    return {
        "layers": {"up_proj": {"kernel": jax.random.normal(keys[0], (LAYERS, D_IN, D_OUT))}},
        "proj": {"kernel": jax.random.normal(keys[1], (D_IN, D_OUT))},
    }


def corrections(spec: AdapterSpec, state) -> np.ndarray:
    """Returns s A B of each layer in float64."""
    a, b = (np.asarray(flatten(state.trainable)[(*PATH, name)], np.float64) for name in ("a", "b"))
    return spec.method.scale * a @ b


def errors(originals, params) -> np.ndarray:
    """Returns W - Q of each layer in float64."""
    return np.asarray(flatten(originals)[PATH], np.float64) - np.asarray(
        dequantize(flatten(params)[PATH]), np.float64
    )


@pytest.mark.parametrize(
    ("method", "quantization"),
    [(LoftQ(rank=RANK, alpha=10.0), "nf4"), (LoftQ(rank=RANK, rank_stabilized=True), "int8")],
    ids=["nf4", "int8"],
)
def test_the_start_is_the_best_correction_in_float64(method, quantization, originals):
    params = quantize_params(originals, quantization)
    spec = AdapterSpec(method)
    found = corrections(spec, spec.init(jax.random.key(0), params, originals=originals))
    for one, error in zip(found, errors(originals, params), strict=True):
        u, s, vt = np.linalg.svd(error)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(one, best, rtol=0, atol=1e-5 * np.abs(error).max())
        left = np.linalg.norm(error - one)
        assert left == pytest.approx(np.sqrt(np.sum(s[RANK:] ** 2)), rel=1e-6)
        assert left < 0.97 * np.linalg.norm(error)


def test_the_start_agrees_with_one_step_of_peft(originals):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("peft.utils.loftq_utils")
    params = quantize_params(originals, "nf4")
    spec = AdapterSpec(LoftQ(rank=RANK, alpha=float(RANK)))  # a scale of 1, as PEFT assumes
    state = spec.init(jax.random.key(0), params, originals=originals)
    a, b = (np.asarray(flatten(state.trainable)[(*PATH, name)], np.float64) for name in ("a", "b"))
    for layer, error in enumerate(errors(originals, params)):
        theirs = utils._low_rank_decomposition(torch.tensor(error.T), reduced_rank=RANK)
        lora_a, lora_b = theirs["R"].numpy(), theirs["L"].numpy()
        signs = np.sign(np.sum(lora_a.T * a[layer], axis=0))
        np.testing.assert_allclose(a[layer] * signs, lora_a.T, atol=2e-5)
        np.testing.assert_allclose(b[layer] * signs[:, None], lora_b.T, atol=2e-5)


def test_a_randomized_start_corrects_nearly_as_much(originals):
    params = quantize_params(originals, "nf4")
    left = []
    for iterations in (0, 8):
        spec = AdapterSpec(LoftQ(rank=RANK, iterations=iterations))
        state = spec.init(jax.random.key(0), params, originals=originals)
        left.append(np.linalg.norm(errors(originals, params) - corrections(spec, state)))
    assert left[0] <= left[1] < 1.01 * left[0]


def test_kernels_that_are_not_quantized_start_as_in_lora(originals):
    params = quantize_params(originals, "nf4")
    found, expected = (
        AdapterSpec(method).init(jax.random.key(0), params, originals=originals).trainable["proj"]
        for method in (LoftQ(rank=RANK), LoRA(rank=RANK))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("quantization", "change", "message"),
    [
        ("none", lambda p: p, r"none that it adapts is quantized; set model\.quantization"),
        ("nf4", lambda p: None, "give originals, the parameters before"),
        ("nf4", lambda p: quantize_params(p, "nf4"), r"layers\.up_proj\.kernel is quantized too"),
        ("nf4", lambda p: {"proj": p["proj"]}, r"layers\.up_proj\.kernel is missing in originals"),
    ],
    ids=["not quantized", "no originals", "quantized originals", "other originals"],
)
def test_a_start_without_errors_is_rejected(quantization, change, message, originals):
    params = quantize_params(originals, quantization)
    with pytest.raises(ValueError, match=message):
        AdapterSpec(LoftQ(rank=RANK)).init(jax.random.key(0), params, originals=change(originals))


def test_kernels_that_were_quantized_before_are_rejected():
    # With a largest value of 127 in each tile, integers are quantized exactly.
    shape = (1, D_IN, D_OUT)
    kernel = jnp.round(jax.random.uniform(jax.random.key(2), shape, minval=-126, maxval=126))
    params = {"layers": {"up_proj": {"kernel": kernel.at[:, ::64].set(127.0)}}}
    with pytest.raises(ValueError, match=r"layers\.up_proj has no error of quantization"):
        AdapterSpec(LoftQ(rank=RANK)).init(
            jax.random.key(0), quantize_params(params, "int8"), originals=params
        )
