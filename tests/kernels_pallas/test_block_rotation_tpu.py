"""The rotation's TPU kernel: on a simulated TPU, and through the real TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_rotation import bench, block_rotation, reference
from kernels_pallas.block_rotation import tpu as kernel
from kernels_pallas.block_rotation.cases import CASES
from kernels_pallas.block_rotation.config import TOKEN_TILES, RotationConfig, choose_config
from kernels_pallas.cases import MODEL_WIDTHS
from kernels_pallas.chips import MIB, VMEM_BYTES
from kernels_pallas.dispatch import KernelError
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for
from kernels_pallas.traffic import Program, measure

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def expect(found, x, g, blocks) -> None:
    expected = reference.forward(x, blocks), *reference.backward(x, g, blocks)
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("case", ["ragged tokens, each row its own", "blocks that straddle lanes"])
def test_on_a_simulated_tpu_nothing_races_and_nothing_unwritten_is_used(simulated_tpu, case):
    x, g, blocks = CASES[case].arrays()
    y, transpose = jax.vjp(block_rotation, jnp.asarray(x), jnp.asarray(blocks))
    expect((y, *transpose(jnp.asarray(g))), x, g, blocks)


def test_many_tiles_add_up():
    """Several tiles along every axis, of which the last ones end beyond the arrays."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 37, 320)).astype(np.float32)
    blocks = rng.normal(size=(10, 32, 32)).astype(np.float32)
    config = RotationConfig(tokens=16, features=128, matrix=128)
    settings = {"precision": None, "interpret": True, "config": config}
    (y,) = jax.jit(lambda *a: kernel.forward(*a, **settings))(x, blocks)
    expect((y, *jax.jit(lambda *a: kernel.backward(*a, **settings))(x, g, blocks)), x, g, blocks)


def test_the_kernel_is_what_runs():
    x, _, blocks = CASES["groups of small blocks"].arrays()

    def text(implementation: str) -> str:
        def both(x, blocks):
            y, transpose = jax.vjp(
                lambda *a: block_rotation(*a, implementation=implementation), x, blocks
            )
            return y, transpose(y)

        return str(jax.make_jaxpr(both)(x, blocks))

    found = text("interpret")
    assert found.count("pallas_call[") == 2
    assert "block_rotation_backward" in found
    assert "pallas_call" not in text("xla") + text("auto")


# The real compiler.


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_every_generation(tpu, chip):
    """One shape in the fast suite; all of them in the slow one."""
    for program in bench.programs(widths={"d": (4096,)}, block_sizes=(16,), dtypes=(BF16,)):
        found = measure(chip, program, "pallas")
        assert found.pallas
        assert found.traffic.total < 1.1 * program.minimum


def test_a_step_for_the_tpu_has_both_kernels_in_it(tpu, said):
    """By the platform lowered for, since none of this process's devices is a TPU."""
    x = jax.ShapeDtypeStruct((2, 256, 512), jnp.bfloat16)
    blocks = jax.ShapeDtypeStruct((32, 16, 16), jnp.float32)

    def loss(x, blocks):
        return jnp.sum(block_rotation(x, blocks).astype(jnp.float32) ** 2)

    text = compile_for("v5e", jax.grad(loss, argnums=(0, 1)), x, blocks).as_text()
    assert "block_rotation" in text
    assert "block_rotation_backward" in text
    assert sum("on tpu: pallas, because" in line for line in said) == 2


def test_a_mesh_of_tpus_runs_it_on_each_device(tpu, said):
    from kernels_pallas.layout import Layout, laid_out

    mesh = jax.sharding.Mesh(np.reshape(tpu.devices("v5e"), (2, 2)), ("rows", "columns"))

    def shape(array, *spec):
        placed = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)

    x = shape(jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16), "rows", None, "columns")
    blocks = shape(jax.ShapeDtypeStruct((8, 128, 128), jnp.float32), "columns")
    with jax.set_mesh(mesh), laid_out(Layout(("rows",), ("columns",))):
        found = jax.jit(lambda *a: block_rotation(*a)).lower(x, blocks).compile().as_text()
    assert tpu_kernels(found) == 1
    assert "all-gather" not in found
    assert "bfloat16[2, 256, 512]" in said[-1]
    # Without a word on how the activations lie, XLA's form runs, and the log says why.
    found = jax.jit(lambda *a: block_rotation(*a)).lower(x, blocks).compile().as_text()
    assert tpu_kernels(found) == 0
    assert "spread over 4 devices and nothing says how" in said[-1]


def tpu_kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_compiles_for_few_tokens_and_features_that_fill_no_lanes(tpu, tokens):
    x = jax.ShapeDtypeStruct((tokens, 80), jnp.bfloat16)
    blocks = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def both(x, blocks):
        y, transpose = jax.vjp(block_rotation, x, blocks)
        return y, transpose(y)

    assert compile_for("v5e", both, x, blocks).as_text().count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("model", MODEL_WIDTHS)
def test_compiles_at_every_width(tpu, chip, model):
    for program in bench.programs(widths={model: MODEL_WIDTHS[model]}):
        found = measure(chip, program, "pallas")
        assert found.pallas, program
        assert found.traffic.total < 1.1 * program.minimum, program


# Tiles.


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("backward", [False, True])
def test_chosen_tiles_fit_every_chip(dtype, backward):
    widths = [width for pair in MODEL_WIDTHS.values() for width in pair]
    for width in widths:
        for block_size in (2, 8, 32, 128, 256):
            config = choose_config(
                tokens=4096, features=width, block_size=block_size, dtype=dtype, backward=backward
            )
            assert width % config.features == 0
            for there in VMEM_BYTES.values():
                config.check(dtype, backward=backward, vmem_bytes=there)


def test_tiles_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="tokens must be a multiple of 16, but is 8"):
        RotationConfig(tokens=8, features=128, matrix=128)
    with pytest.raises(ValueError, match="matrix must be a multiple of 128, but is 96"):
        RotationConfig(tokens=16, features=96, matrix=96)
    with pytest.raises(ValueError, match="multiple of the matrix, 256, but is 384"):
        RotationConfig(tokens=16, features=384, matrix=256)
    large = RotationConfig(tokens=TOKEN_TILES[0], features=4096, matrix=128)
    with pytest.raises(ValueError, match=r"needs .* MiB of the chip's vector memory .* has 14.0"):
        large.check(F32, backward=True, vmem_bytes=16 * MIB)
    large.check(F32, backward=True, vmem_bytes=VMEM_BYTES["v6e"])


def test_a_large_tile_that_a_chip_has_room_for_compiles(tpu):
    config = RotationConfig(tokens=TOKEN_TILES[0], features=4096, matrix=128)
    x = jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
    blocks = jax.ShapeDtypeStruct((32, 128, 128), jnp.float32)
    settings = {"precision": None, "interpret": False, "config": config}
    # A mesh of TPUs says which chip it is, and how much there is.
    with jax.set_mesh(jax.sharding.Mesh(tpu.devices("v6e")[:1], ("one",))):
        found = compile_for("v6e", lambda *a: kernel.backward(*a, **settings), x, x, blocks)
    assert tpu.runs_pallas(found)


def test_numbers_no_kernel_takes_are_left_to_xla(tpu, said):
    x = jax.ShapeDtypeStruct((64, 128), jnp.float16)
    blocks = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)
    assert not tpu.runs_pallas(compile_for("v5e", block_rotation, x, blocks))
    assert "xla, because a TPU's kernels take bfloat16 and float32, and x is float16" in said[-1]


def test_blocks_no_matrix_holds_are_left_to_xla(tpu, said):
    x = jax.ShapeDtypeStruct((64, 14 * 7), jnp.float32)
    blocks = jax.ShapeDtypeStruct((14, 7, 7), jnp.float32)
    assert not tpu.runs_pallas(compile_for("v5e", block_rotation, x, blocks))
    assert "xla, because blocks of 7 would be multiplied as matrices of 896" in said[-1]
    with pytest.raises(KernelError, match="blocks of 7 would be multiplied as matrices of 896"):
        compile_for("v5e", lambda *a: block_rotation(*a, implementation="pallas"), x, blocks)


def test_the_minimum_is_one_read_and_one_write():
    (forward, backward) = bench.programs(widths={"d": (4096,)}, block_sizes=(16,), dtypes=(BF16,))
    assert isinstance(forward, Program)
    x, blocks = bench.TOKENS * 4096 * 2, 4096 * 16 * 4
    assert forward.minimum == 2 * x + blocks
    assert backward.minimum == 3 * x + 2 * blocks
