"""Tests shardings derived from logical axis rules."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from peft_jax.parallel import (
    MESH_AXES,
    LogicalAxisRules,
    MeshSettings,
    batch_sharding,
    make_mesh,
    sharding_tree,
)

AXES = {
    "embed_tokens": {"embedding": ("vocab", "embed")},
    "layers": {
        "q_proj": {"kernel": ("layers", "embed", "heads")},
        "k_proj": {"kernel": ("layers", "embed", "kv_heads")},
        "o_proj": {"kernel": ("layers", "heads", "embed")},
        "down_proj": {"kernel": {"a": ("layers", "mlp", None), "b": ("layers", None, "embed")}},
        "input_layernorm": {"scale": ("layers", "norm")},
    },
}


def llama(layers, vocab, embed, heads, kv_heads, mlp, rank=16):
    sizes = locals() | {"norm": embed, None: rank}
    return jax.tree.map(
        lambda axes: jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), jnp.float32),
        AXES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


LLAMA_405B = llama(126, 128256, 16384, 128 * 128, 8 * 128, 53248)


def test_specs_follow_the_rules():
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda sharding: sharding.spec, sharding_tree(AXES, mesh))
    assert specs["embed_tokens"]["embedding"] == P("tensor", "fsdp")
    assert specs["layers"]["q_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers"]["o_proj"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["layers"]["down_proj"]["kernel"]["b"] == P(None, None, "fsdp")
    assert specs["layers"]["input_layernorm"]["scale"] == P(None, None)
    assert batch_sharding(mesh).spec == P(("slice", "data", "fsdp", "expert"))


def test_arrays_are_sharded_by_the_rules():
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    shapes = llama(3, 40, 8, 12, 4, 16, rank=2)
    shardings = sharding_tree(AXES, mesh, LogicalAxisRules(), shapes)
    arrays = jax.tree.map(lambda s: np.arange(np.prod(s.shape)).reshape(s.shape), shapes)
    placed = jax.device_put(arrays, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, arrays)
    kernel = placed["layers"]["q_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 4, 6)}
    rows = jax.device_put(np.zeros((8, 5)), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 5)}


def test_sharded_product_equals_the_product():
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 12)))
    shardings = sharding_tree({"w": ("embed", "mlp")}, mesh)
    product = jax.jit(jnp.matmul)(
        jax.device_put(x, batch_sharding(mesh)), jax.device_put(w, shardings["w"])
    )
    np.testing.assert_allclose(product, x @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 128, 1, 1, 1), (1, 1, 16, 1, 1, 8), (2, 1, 8, 1, 1, 8), (1, 1, 8, 1, 2, 8)],
)
def test_llama_405b_divides_over_128_chips(shape, caplog):
    """Every rule applies, so each chip holds 1/(fsdp·tensor) of the kernels."""
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    with caplog.at_level(logging.WARNING):
        shardings = sharding_tree(AXES, mesh, LogicalAxisRules(), LLAMA_405B)
    assert not caplog.records
    kernel, sharding = (t["layers"]["q_proj"]["kernel"] for t in (LLAMA_405B, shardings))
    part = np.prod(sharding.shard_shape(kernel.shape))
    assert part * mesh.shape["fsdp"] * mesh.shape["tensor"] == np.prod(kernel.shape)


def test_indivisible_axes_are_replicated_and_named(caplog):
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=4))
    shapes = llama(3, 41, 8, 12, 6, 16, rank=2)
    with caplog.at_level(logging.WARNING):
        shardings = sharding_tree(AXES, mesh, LogicalAxisRules(), shapes)
    assert shardings["embed_tokens"]["embedding"].spec == P(None, "fsdp")
    assert shardings["layers"]["k_proj"]["kernel"].spec == P(None, "fsdp", None)
    assert shardings["layers"]["q_proj"]["kernel"].spec == P(None, "fsdp", "tensor")
    (record,) = caplog.records
    assert "embed_tokens.embedding: vocab of 41" in record.message
    assert "layers.k_proj.kernel: kv_heads of 6" in record.message
    assert "q_proj" not in record.message


def test_several_mesh_axes_are_dropped_from_the_last():
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=4))
    rules = LogicalAxisRules(embed=None, mlp=("fsdp", "tensor"))
    specs = {
        size: sharding_tree({"w": ("embed", "mlp")}, mesh, rules, {"w": jnp.zeros((4, size))})[
            "w"
        ].spec
        for size in (16, 6, 5)
    }
    assert specs == {
        16: P(None, ("fsdp", "tensor")),
        6: P(None, "fsdp"),
        5: P(None, None),
    }


def test_empty_branches_stay_in_the_tree():
    mesh = make_mesh()
    axes = {"kernel": {"low_rank": {"a0": ("embed", None)}, "rotation": {}}}
    shardings = sharding_tree(axes, mesh)
    assert shardings["kernel"]["rotation"] == {}


def test_mesh_axis_used_twice_is_rejected_with_the_arrays_name():
    rules = LogicalAxisRules(mlp="fsdp")
    with pytest.raises(ValueError, match=r"layers\.down_proj\.kernel.*'fsdp'.*'mlp' and 'embed'"):
        sharding_tree(
            {"layers": {"down_proj": {"kernel": ("layers", "mlp", "embed")}}}, make_mesh(), rules
        )


def test_unknown_logical_axes_are_rejected_with_the_arrays_name():
    with pytest.raises(ValueError, match=r"layers\.w: .*'embd'.*'embed'"):
        sharding_tree({"layers": {"w": ("embd",)}}, make_mesh())
    with pytest.raises(ValueError, match=r"w .*\(4,\).*\('embed', 'mlp'\)"):
        sharding_tree({"w": ("embed", "mlp")}, make_mesh(), None, {"w": jnp.zeros(4)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp": "tensr"}, "mlp .*'tensr'.* 'tensor'"),
        ({"batch": ("data", "data")}, r"batch .*\('data', 'data'\)"),
    ],
)
def test_invalid_rules_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        LogicalAxisRules(**given)
