"""The block rotation's TPU kernel: on a simulated TPU, and through the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_rotation import bench, block_rotation, reference
from kernels_pallas.block_rotation import tpu as kernel
from kernels_pallas.block_rotation.cases import CASES
from kernels_pallas.block_rotation.config import TOKEN_TILES, RotationConfig, choose_config
from kernels_pallas.dispatch import KernelError
from kernels_pallas.layout import Layout, use_layout
from kernels_pallas.memory_traffic import Program, measure
from kernels_pallas.shared_cases import MODEL_WIDTHS
from kernels_pallas.target_device import MIB, VMEM_BYTES
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def expect(found, x, g, blocks) -> None:
    expected = reference.forward(x, blocks), *reference.backward(x, g, blocks)
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("case", ["ragged tokens, each row its own", "blocks that straddle lanes"])
def test_simulated_tpu_finds_no_race_and_no_unwritten_read(simulated_tpu, case):
    x, g, blocks = CASES[case].arrays()
    y, transpose = jax.vjp(block_rotation, jnp.asarray(x), jnp.asarray(blocks))
    expect((y, *transpose(jnp.asarray(g))), x, g, blocks)


def test_sums_over_many_tiles():
    """Uses several tiles along every axis; the last ones extend past the arrays."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 37, 320)).astype(np.float32)
    blocks = rng.normal(size=(10, 32, 32)).astype(np.float32)
    config = RotationConfig(tokens=16, features=128, matrix=128)
    settings = {"precision": None, "interpret": True, "config": config}
    (y,) = jax.jit(lambda *a: kernel.forward(*a, **settings))(x, blocks)
    expect((y, *jax.jit(lambda *a: kernel.backward(*a, **settings))(x, g, blocks)), x, g, blocks)


def test_interpret_runs_the_kernel():
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


# Through the TPU compiler.


@pytest.mark.fast("v5p")
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_every_generation(tpu, chip):
    """Compiles one shape here; the slow test below compiles all of them."""
    for program in bench.programs(widths={"d": (4096,)}, block_sizes=(16,), dtypes=(BF16,)):
        found = measure(chip, program, "pallas")
        assert found.pallas
        assert found.traffic.total < 1.1 * program.minimum


def test_program_for_a_tpu_contains_both_kernels(tpu, kernel_log):
    """The platform lowered for decides; no device of this process is a TPU."""
    x = jax.ShapeDtypeStruct((2, 256, 512), jnp.bfloat16)
    blocks = jax.ShapeDtypeStruct((32, 16, 16), jnp.float32)

    def loss(x, blocks):
        return jnp.sum(block_rotation(x, blocks).astype(jnp.float32) ** 2)

    text = compile_for("v5e", jax.grad(loss, argnums=(0, 1)), x, blocks).as_text()
    assert "block_rotation" in text
    assert "block_rotation_backward" in text
    assert sum("on tpu: pallas" in line for line in kernel_log) == 2


def test_runs_on_each_device_of_a_tpu_mesh(tpu, kernel_log):
    mesh = jax.sharding.Mesh(np.reshape(tpu.devices("v5e"), (2, 2)), ("rows", "columns"))

    def shape(array, *spec):
        placed = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)

    x = shape(jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16), "rows", None, "columns")
    blocks = shape(jax.ShapeDtypeStruct((8, 128, 128), jnp.float32), "columns")
    with jax.set_mesh(mesh), use_layout(Layout(("rows",), ("columns",))):
        found = jax.jit(lambda *a: block_rotation(*a)).lower(x, blocks).compile().as_text()
    assert tpu_kernels(found) == 1
    assert "all-gather" not in found
    assert "bfloat16[2, 256, 512]" in kernel_log[-1]
    # With an unknown layout, XLA's form runs, and the log gives the reason.
    found = jax.jit(lambda *a: block_rotation(*a)).lower(x, blocks).compile().as_text()
    assert tpu_kernels(found) == 0
    assert "operands span 4 devices" in kernel_log[-1]


def tpu_kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_compiles_for_few_tokens_and_partial_lanes(tpu, tokens):
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


def test_rejects_invalid_tiles():
    with pytest.raises(ValueError, match=r"tokens is 8\b.*16"):
        RotationConfig(tokens=8, features=128, matrix=128)
    with pytest.raises(ValueError, match=r"matrix is 96\b.*128"):
        RotationConfig(tokens=16, features=96, matrix=96)
    with pytest.raises(ValueError, match=r"features is 384\b.*256"):
        RotationConfig(tokens=16, features=384, matrix=256)
    large = RotationConfig(tokens=TOKEN_TILES[0], features=4096, matrix=128)
    with pytest.raises(ValueError, match=r"4096 features.* MiB .*14\.0 MiB"):
        large.check(F32, backward=True, vmem_bytes=16 * MIB)
    large.check(F32, backward=True, vmem_bytes=VMEM_BYTES["v6e"])


@pytest.mark.slow
def test_compiles_a_large_tile_on_a_large_chip(tpu):
    config = RotationConfig(tokens=TOKEN_TILES[0], features=4096, matrix=128)
    x = jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
    blocks = jax.ShapeDtypeStruct((32, 128, 128), jnp.float32)
    settings = {"precision": None, "interpret": False, "config": config}
    # A mesh of TPUs tells which chip it is, and so its VMEM.
    with jax.set_mesh(jax.sharding.Mesh(tpu.devices("v6e")[:1], ("one",))):
        found = compile_for("v6e", lambda *a: kernel.backward(*a, **settings), x, x, blocks)
    assert tpu.runs_pallas(found)


def test_falls_back_to_xla_for_an_unsupported_dtype(tpu, kernel_log):
    x = jax.ShapeDtypeStruct((64, 128), jnp.float16)
    blocks = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)
    assert not tpu.runs_pallas(compile_for("v5e", block_rotation, x, blocks))
    assert "on tpu: xla (x is float16" in kernel_log[-1]


def test_falls_back_to_xla_for_an_unsupported_block_size(tpu, kernel_log):
    x = jax.ShapeDtypeStruct((64, 14 * 7), jnp.float32)
    blocks = jax.ShapeDtypeStruct((14, 7, 7), jnp.float32)
    assert not tpu.runs_pallas(compile_for("v5e", block_rotation, x, blocks))
    assert "on tpu: xla (blocks of 7" in kernel_log[-1]
    with pytest.raises(KernelError, match=r"blocks of 7\b.*896"):
        compile_for("v5e", lambda *a: block_rotation(*a, implementation="pallas"), x, blocks)


def test_minimum_is_one_read_and_one_write():
    (forward, backward) = bench.programs(widths={"d": (4096,)}, block_sizes=(16,), dtypes=(BF16,))
    assert isinstance(forward, Program)
    x, blocks = bench.TOKENS * 4096 * 2, 4096 * 16 * 4
    assert forward.minimum == 2 * x + blocks
    assert backward.minimum == 3 * x + 2 * blocks
