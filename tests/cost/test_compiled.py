"""Tests the count of programs that the TPU compiler made, against a recount by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.block_rotation import block_rotation
from peft_jax.cost import estimate_program, find_topology, network_of, read_program
from peft_jax.cost.timeline import HOP, LINKS, MEMORY, PRODUCTS
from peft_jax.parallel import MeshSettings, make_mesh, on_mesh

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
FLOPS, BANDWIDTH, AXIS = 459e12 * PRODUCTS, 2765e9 * MEMORY, 180e9 * LINKS


@pytest.fixture(scope="module")
def mesh():
    """64 chips of v5p, whose "fsdp" spans two axes of the torus."""
    settings = MeshSettings(data=1, fsdp=16, tensor=4)
    return make_mesh(settings, find_topology("v5p:4x4x4").devices)


def estimate(function, mesh, *arguments):
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    with on_mesh(mesh):
        text = jax.jit(function).lower(*shapes).compile().as_text()
    chip = find_topology("v5p:4x4x4").chip
    network = network_of(list(mesh.devices.flat), "v5p", 1, 1)
    return estimate_program(read_program(text), chip=chip, network=network)


def test_gather_over_two_torus_axes_is_added_to_its_product(mesh):
    """An array of 32 MiB comes in over the links of both axes, from both sides of each."""

    @jax.shard_map(mesh=mesh, in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp"), check_vma=False)
    def function(x, w):
        return x @ jax.lax.all_gather(w, "fsdp", tiled=True)

    found = estimate(
        function,
        mesh,
        ((16 * 4096, 4096), jnp.bfloat16, P("fsdp")),
        ((4096, 4096), jnp.bfloat16, P("fsdp")),
    )
    product = 2 * 4096**3
    assert found.flops == product
    assert found.by_kind()["products"] == pytest.approx(product / FLOPS)
    (transfer,) = (one for one in found.transfers if one.kind == "links")
    assert (transfer.collective.kind, transfer.collective.group) == ("all-gather", 16)
    assert not transfer.asynchronous
    gather = 15 / 16 * 2**25 / (2 * AXIS) + 4 * HOP
    assert transfer.seconds == pytest.approx(gather)
    assert found.total == pytest.approx(product / FLOPS + gather, rel=1e-3)


def test_scanned_layers_count_each_time_and_fill_the_vector_memory(mesh):
    """Six layers with two products each, and four more in their gradient."""

    def function(x, layers):
        def body(x, layer):
            return jax.nn.relu(x @ layer[0]) @ layer[1], None

        return jnp.sum(jax.lax.scan(body, x, layers)[0].astype(jnp.float32))

    rows, width, mlp, count = 2048, 1024, 4096, 6
    found = estimate(
        lambda x, up, down: jax.grad(function, argnums=1)(x, (up, down)),
        mesh,
        ((16 * rows, width), jnp.bfloat16, P("fsdp")),
        ((count, width, mlp), jnp.bfloat16, P()),
        ((count, mlp, width), jnp.bfloat16, P()),
    )
    one = 2 * rows * width * mlp
    # Forward two, backward two for the weights and two for the inputs, though not the first's.
    assert 5 * count * one <= found.flops <= 6 * count * one
    np.testing.assert_allclose(found.by_kind()["products"], found.flops / FLOPS, rtol=0.1)


def test_rotation_counts_in_its_kernel_on_every_device_that_repeats_it(mesh):
    """On a TPU, blocks of 32 are multiplied as blocks of 128, by one device as by its neighbors.

    The kernel reads and writes the rows once, which takes longer than its products.
    """
    rows, width, block = 2048, 4096, 32

    @jax.shard_map(mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False)
    def function(x, blocks):
        return block_rotation(x, blocks)

    found = estimate(
        function,
        mesh,
        ((16, rows, width), jnp.bfloat16, P("fsdp")),
        ((width // block, block, block), jnp.float32, P()),
    )
    assert found.flops == pytest.approx(2 * rows * width * 128, rel=0.02)
    assert found.by_kind()["memory"] == pytest.approx(2 * rows * width * 2 / BANDWIDTH, rel=0.2)
