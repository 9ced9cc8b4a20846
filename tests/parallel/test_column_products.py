"""Tests products of one input on a mesh: values, gradients, and what the program sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    HRA,
    OFT,
    Hybrid,
    LoRA,
    Unitary,
)
from peft_jax.adapters.method import GradientFactors
from peft_jax.core import AdaptedKernel, flatten, linear
from peft_jax.core.quantized import quantize
from peft_jax.parallel import MeshSettings, column_products, constrain, make_mesh, on_mesh

BATCH, TOKENS, EMBED = 4, 8, 32
WIDTHS = (64, 16, 16)
AXES = (("embed", "heads"), ("embed", "kv_heads"), ("embed", "kv_heads"))
METHODS = {
    "boft": BOFT(block_size=4, n_butterfly_factors=2),
    "factors": BOFT(block_size=4, n_butterfly_factors=1),
    "oft": OFT(block_size=4),
    "hra": HRA(rank=4),
    "hybrid": Hybrid(rank=2, block_size=4),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSettings(devices=4, data=1, fsdp=2, tensor=2))


def make_inputs(method, quantization="none"):
    """Returns rows, kernels and arrays of adapters, away from their start."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, kernels, learned, fixed = normal(BATCH, TOKENS, EMBED), [], [], []
    for width in WIDTHS:
        kernel = normal(EMBED, width) / 6
        kernels.append(kernel if quantization == "none" else quantize(kernel, quantization))
        rank = method.gradient_rank
        factors = GradientFactors(
            *(normal(*shape) for shape in ((EMBED, rank), (rank,), (width, rank)))
        )
        trainable, constant = method.init(jax.random.key(1), (EMBED, width), factors)
        learned.append(jax.tree.map(lambda a: a + 0.1 * normal(*a.shape), trainable))
        fixed.append(constant)
    return x, kernels, learned, fixed


def make_loss(method, kernels, fixed, products):
    def loss(x, learned):
        x = constrain(x, ("batch", "tokens", None))
        adapted = [
            AdaptedKernel(base=kernel, arrays=method.prepare(arrays, constant), method=method)
            for kernel, arrays, constant in zip(kernels, learned, fixed, strict=True)
        ]
        return sum(jnp.sum(jnp.square(y) + y) for y in products(x, adapted)) / 100

    return jax.value_and_grad(loss, argnums=(0, 1))


def alone(x, adapted):
    return [linear(x, kernel) for kernel in adapted]


def together(x, adapted):
    found = column_products(x, list(zip(adapted, AXES, strict=True)))
    assert all(y is not None for y in found)
    return found


@pytest.mark.fast("factors-none", "hybrid-int8")
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_without_a_mesh(mesh, monkeypatch, name, quantization):
    if name == "factors":
        monkeypatch.setattr("peft_jax.adapters.boft.MAX_COMPOSED_BLOCK", 1)
    method = METHODS[name]
    x, kernels, learned, fixed = make_inputs(method, quantization)
    wanted = jax.jit(make_loss(method, kernels, fixed, alone))(x, learned)
    with on_mesh(mesh):
        found = jax.jit(make_loss(method, kernels, fixed, together))(x, learned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


def test_products_of_integers_run_on_shards_with_and_without_an_adapter(mesh):
    """LoRA's products of other kernels are left to the compiler."""
    method = LoRA(rank=2)
    x, kernels, learned, fixed = make_inputs(method, "w8a8")

    def products_of(multiply):
        return lambda x, adapted: multiply(x, [*adapted[:2], kernels[2]])

    wanted = jax.jit(make_loss(method, kernels, fixed, products_of(alone)))(x, learned)
    with on_mesh(mesh):
        found = jax.jit(make_loss(method, kernels, fixed, products_of(together)))(x, learned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize("name", ["boft", "hybrid"])
def test_gradients_are_summed_once_for_all_products(mesh, name):
    """The compiler alone sums the gradient of each product, three all-reduces here."""
    method = METHODS[name]
    x, kernels, learned, fixed = make_inputs(method)
    with on_mesh(mesh):
        compiled = jax.jit(make_loss(method, kernels, fixed, together)).lower(x, learned).compile()
    rows, whole, part = BATCH // 2, TOKENS, TOKENS // 2
    sent = re.findall(
        r"= f32\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter)\(", compiled.as_text()
    )
    activations = {f"{rows},{whole},{EMBED}", f"{rows},{part},{EMBED}"}
    kinds = [kind for shape, kind in sent if shape in activations]
    assert kinds.count("reduce-scatter") == 1
    assert kinds.count("all-reduce") == 0
    # Forwards, and again backwards if the compiler does not keep the gathered tokens.
    assert kinds.count("all-gather") in (1, 2)


def test_only_shards_are_kept_for_the_backward_pass(mesh):
    method = METHODS["boft"]
    x, kernels, learned, fixed = make_inputs(method)
    arrays = [method.prepare(a, b) for a, b in zip(learned, fixed, strict=True)]

    def products(x, arrays):
        adapted = [
            AdaptedKernel(base=kernel, arrays=one, method=method)
            for kernel, one in zip(kernels, arrays, strict=True)
        ]
        return together(x, adapted)

    with on_mesh(mesh):
        _, pullback = jax.eval_shape(lambda x, a: jax.vjp(products, x, a), x, arrays)
    # Of a shard, JAX puts what it keeps on each device together along the first axis.
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    outputs = sum(BATCH * TOKENS * width for width in WIDTHS)
    assert kept <= outputs + sum(leaf.size for leaf in jax.tree.leaves((x, kernels, arrays)))


@pytest.mark.parametrize(
    ("method", "shape", "axes"),
    [
        (LoRA(rank=2), (EMBED, 64), ("embed", "heads")),  # does not map its input
        (Unitary(), (EMBED, 64), ("embed", "heads")),  # mixes all features
        (METHODS["boft"], (EMBED, 33), ("embed", "heads")),  # 33 columns over 2 devices
        (METHODS["boft"], (64, EMBED), ("mlp", "embed")),  # its rows are sharded along "tensor"
    ],
)
def test_other_products_are_left_to_the_compiler(mesh, method, shape, axes):
    trainable, constant = method.init(jax.random.key(0), shape)
    kernel = AdaptedKernel(
        base=jnp.ones(shape), arrays=method.prepare(trainable, constant), method=method
    )
    x = jnp.ones((BATCH, TOKENS, shape[0]))
    assert column_products(x, [(kernel, axes)]) == [None]  # without a mesh
    with on_mesh(mesh):
        assert column_products(x, [(kernel, axes)]) == [None]


@pytest.mark.parametrize("name", METHODS)
def test_axes_name_every_prepared_array(name):
    method = METHODS[name]
    _, _, learned, fixed = make_inputs(method)
    arrays = flatten(method.prepare(learned[0], fixed[0]))
    axes = flatten(method.prepared_axes("embed", "heads"))
    assert arrays.keys() == axes.keys()
    sizes = {"embed": EMBED, "heads": WIDTHS[0]}
    for path, array in arrays.items():
        assert len(axes[path]) == array.ndim
        for axis, size in zip(axes[path], array.shape, strict=True):
            assert axis is None or sizes[axis] % size == 0
