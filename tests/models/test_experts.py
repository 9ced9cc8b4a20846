"""Mixtures of experts: grouped products, routing on a mesh, loading, and what is rejected.

Parity with transformers is checked with that of the other families, in `test_decoder_families`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_mixtral import MIXTRAL

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.convert import convert_checkpoint
from peft_jax.core import dequantize, flatten, grouped, grouped_linear, quantize, unflatten
from peft_jax.cost import count_flops
from peft_jax.hub import load_model, save_model
from peft_jax.models import build_model
from peft_jax.models.model import quantize_params
from peft_jax.parallel import LogicalAxisRules, MeshSettings, make_mesh, on_mesh, sharding_tree

QWEN3_MOE = MIXTRAL | {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "head_dim": 8}

SIZES = {
    "uneven": [3, 0, 20, 1],
    "one group": [0, 24, 0, 0],
    "rows beyond": [2, 5, 0, 4],
}


def by_group(sizes, x, kernels):
    """Returns each row's product with its group's kernel, in float64."""
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return np.einsum("md,mdf->mf", x[: len(rows)], kernels[rows])


@pytest.fixture
def operands():
    generator = np.random.default_rng(0)
    shapes = {"x": (24, 16), "kernels": (4, 16, 6), "dy": (24, 6)}
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_products_and_gradients_are_those_of_each_group(sizes, operands):
    x, kernels, dy = (jnp.asarray(operands[n], jnp.float32) for n in ("x", "kernels", "dy"))
    count = sum(sizes)
    numbers = jnp.asarray(sizes, jnp.int32)
    inside = (jnp.arange(24) < count)[:, None]

    @jax.jit
    def products(x, kernels):
        y, pull_back = jax.vjp(lambda x, w: grouped_linear(x, w, numbers), x, kernels)
        return y, *pull_back(jnp.where(inside, dy, 0.0))

    y, dx, dkernels = products(x, kernels)
    wide = {name: array[:count] for name, array in operands.items() if name != "kernels"}
    weights = operands["kernels"]
    np.testing.assert_allclose(y[:count], by_group(sizes, wide["x"], weights), atol=1e-5)
    transposed = by_group(sizes, wide["dy"], weights.swapaxes(1, 2))
    np.testing.assert_allclose(dx[:count], transposed, atol=1e-5)
    of_groups = np.repeat(np.eye(4), sizes, axis=0)
    expected = np.einsum("mg,md,mf->gdf", of_groups, wide["x"], wide["dy"])
    np.testing.assert_allclose(dkernels, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_form_of_accelerators_agrees_with_that_of_cpus(sizes, operands):
    x, kernels, dy = (jnp.asarray(operands[n], jnp.float32) for n in ("x", "kernels", "dy"))
    numbers, count = jnp.asarray(sizes, jnp.int32), sum(sizes)
    for transposed, rows in ((False, x), (True, dy)):
        forms = [
            multiply(rows, kernels, numbers, transposed=transposed)[:count]
            for multiply in (grouped.multiply_ragged, grouped.multiply_in_blocks)
        ]
        np.testing.assert_allclose(*forms, atol=1e-5)
    forms = [add(x, dy, numbers) for add in (grouped.sum_ragged, grouped.sum_in_blocks)]
    np.testing.assert_allclose(*forms, atol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_groups_multiply_as_when_dequantized(quantization, operands):
    x, kernels = (jnp.asarray(operands[n], jnp.float32) for n in ("x", "kernels"))
    kept, numbers = quantize(kernels, quantization), jnp.array([3, 0, 20, 1])
    found = jax.grad(lambda x: jnp.sum(grouped_linear(x, kept, numbers) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(grouped_linear(x, dequantize(kept), numbers) ** 2))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_operations_are_counted_for_the_chosen_experts_only():
    x, kernels = jnp.ones((24, 16)), jnp.ones((4, 16, 6))

    def loss(x, kernels):
        return jnp.sum(grouped_linear(x, kernels, jnp.array([3, 0, 20, 1])))

    one = 2 * 24 * 16 * 6
    assert count_flops(loss, x, kernels).flops == one
    assert count_flops(jax.grad(loss), x, kernels).flops == 2 * one
    assert count_flops(jax.grad(loss, argnums=(0, 1)), x, kernels).flops == 3 * one


@pytest.fixture(scope="module")
def mixtral():
    model = build_model(MIXTRAL)
    return model, model.init_params(jax.random.key(0))


MESHES = {
    "tensor=4": {"data": 2, "tensor": 4},
    "sequence=2": {"sequence": 2, "tensor": 2, "fsdp": 2},
    "fsdp=8": {"fsdp": 8, "data": 1},
    "tensor=8": {"tensor": 8, "data": 1},
}


def all_to_two(params):
    """Returns the parameters with a router of zeros: every token chooses the first two experts."""
    leaves = flatten(params)
    path = ("layers", "mlp", "gate", "kernel")
    return unflatten(leaves | {path: jnp.zeros_like(leaves[path])})


@pytest.mark.parametrize(
    "mesh",
    [name if name == "tensor=4" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_experts_on_a_mesh_compute_what_one_device_does(mesh, mixtral, relative_error):
    model, params = mixtral
    rows = jnp.asarray(np.random.default_rng(0).integers(1, 61, (8, 8)), jnp.int32)

    def loss(params, rows):
        return jnp.mean(jnp.square(model(params, rows)))

    alone, sharded = (jax.jit(jax.value_and_grad(loss)) for _ in range(2))
    mesh, rules = make_mesh(MeshSettings(**MESHES[mesh])), LogicalAxisRules()
    shardings = sharding_tree(model.logical_axes(), mesh, rules, model.abstract_params())
    for routed in (params, all_to_two(params)):
        expected = alone(routed, rows)
        with on_mesh(mesh, rules):
            found = sharded(jax.device_put(routed, shardings), rows)
        for path, gradient in flatten(expected[1]).items():
            assert relative_error(flatten(found[1])[path], gradient) < 1e-5, path
        assert relative_error(found[0], expected[0]) < 1e-6


def test_a_mesh_that_does_not_divide_the_experts_is_named(mixtral):
    model, _ = mixtral
    assert model.shardable_sizes()["experts"] == 4
    assert model.active_share(("layers", "mlp", "experts", "down_proj", "kernel")) == 0.5


def test_quantized_and_converted_experts_load(mixtral, tmp_path):
    model, params = mixtral
    save_model(tmp_path / "model", model, params)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    for quantization in ("int8", "nf4"):
        _, found = load_model(tmp_path / "model", quantization=quantization)
        expected = quantize_params(params, quantization)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
        assert isinstance(flatten(found)["layers", "mlp", "gate", "kernel"], jax.Array)
    with pytest.raises(ValueError, match=r"experts\.down_proj.*w8a8.*int8 or nf4"):
        load_model(tmp_path / "model", quantization="w8a8")
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "converted"), dtype="float32")
    again, found = load_model(tmp_path / "converted")
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_sharded_experts_load_from_a_checkpoint(mixtral, tmp_path):
    model, params = mixtral
    save_model(tmp_path, model, params)
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
    shardings = sharding_tree(model.logical_axes(), mesh, None, model.abstract_params())
    _, found = load_model(tmp_path, sharding=shardings)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": 0}, "mlp_only_layers = 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5.* at most .* 4"),
        ({"num_local_experts": 0}, "num_local_experts = 0"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
    ],
    ids=str,
)
def test_configurations_that_are_not_implemented_are_rejected_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(QWEN3_MOE | changes)


def test_router_jitter_is_rejected():
    with pytest.raises(ValueError, match=r"router_jitter_noise = 0\.1"):
        build_model(MIXTRAL | {"router_jitter_noise": 0.1})


def test_a_router_is_trained_in_full_if_named(mixtral):
    model, params = mixtral
    spec = AdapterSpec(LoRA(), modules_to_save=("gate",))
    state = spec.init(jax.random.key(1), params)
    tokens = jnp.arange(12).reshape(2, 6)

    def loss(trainable):
        return jnp.sum(model(spec.bind(params, state.replace(trainable=trainable)), tokens) ** 2)

    gradient = flatten(jax.jit(jax.grad(loss))(state.trainable))["layers", "mlp", "gate", "kernel"]
    assert float(jnp.abs(gradient).max()) > 1e-3


def test_num_experts_may_have_either_name():
    old = {key: value for key, value in QWEN3_MOE.items() if key != "num_local_experts"}
    one = build_model(old | {"num_experts": 4})
    assert one.config == build_model(QWEN3_MOE).config
    assert json.loads(one.hf_json)["num_experts"] == 4
