"""The unitary product's TPU kernels: on a simulated TPU, and through the TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.dispatch import KernelError
from kernels_pallas.layout import Layout, use_layout
from kernels_pallas.memory_traffic import measure
from kernels_pallas.shared_cases import tolerance
from kernels_pallas.target_device import MIB, VMEM_BYTES
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for
from kernels_pallas.unitary import bench, fourier, reference, unitary_product
from kernels_pallas.unitary import tpu as kernel
from kernels_pallas.unitary.cases import KERNEL_CASES, MODELS_BY_WIDTH, Case
from kernels_pallas.unitary.config import UnitaryConfig, choose_config, resolve_precision

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
DEFAULT, HIGH, HIGHEST = (
    jax.lax.Precision.DEFAULT,
    jax.lax.Precision.HIGH,
    jax.lax.Precision.HIGHEST,
)
NAMES = ("y", "dx", "dphases", "dreflections")


def direct(case: Case, dtype, *, precision=None, configs=(None, None)) -> list[jax.Array]:
    """Returns (y, dx, dphases, dreflections) by calling the kernels directly, interpreted."""
    x, g, *parameters = case.arrays()
    x, g = jnp.asarray(x, dtype), jnp.asarray(g, dtype)
    settings = {"precision": precision, "interpret": True}
    forward, backward = (
        jax.jit(functools.partial(function, config=config, **settings))
        for function, config in zip((kernel.forward, kernel.backward), configs, strict=True)
    )
    parameters = [jnp.asarray(p) for p in parameters]
    return [*forward(x, *parameters), *backward(x, g, *parameters)]


def expected_of(case: Case) -> list[np.ndarray]:
    x, g, *parameters = case.arrays()
    return [reference.forward(x, *parameters), *reference.backward(x, g, *parameters)]


def errors(found: list, case: Case) -> dict[str, float]:
    """Returns the relative root-mean-square error of each result."""
    return {
        name: float(np.linalg.norm(np.asarray(one, np.float64) - wanted) / np.linalg.norm(wanted))
        for name, one, wanted in zip(NAMES, found, expected_of(case), strict=True)
    }


@pytest.mark.parametrize(
    "case",
    ["one piece, no padding of rows", pytest.param("one row", marks=pytest.mark.slow)],
)
def test_value_and_gradients(case):
    found = direct(KERNEL_CASES[case], F32)
    assert max(errors(found, KERNEL_CASES[case]).values()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", ["an odd number of pieces, ragged rows"])
def test_bfloat16_error_is_the_rounding_of_the_result(case):
    found = direct(KERNEL_CASES[case], BF16)
    assert [one.dtype for one in found] == [BF16, BF16, F32, F32]
    lost = errors(found, KERNEL_CASES[case])
    # Rounding to 8 bits has a root-mean-square error of 2^-9 / √3 relative to the result.
    assert max(lost["y"], lost["dx"]) < 1.75e-3
    assert max(lost["dphases"], lost["dreflections"]) < 2e-5


@pytest.mark.slow
def test_lower_precision_has_larger_errors():
    case = KERNEL_CASES["one piece, no padding of rows"]
    lost = errors(direct(case, F32, precision=DEFAULT), case)
    assert all(1e-3 < error < 1e-2 for error in lost.values())
    lost = errors(direct(case, F32, precision=HIGH), case)
    assert all(1e-7 < error < 2e-5 for error in lost.values())


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 40), pieces=st.integers(1, 4), steps_of=st.sampled_from([8, 16]))
def test_random_numbers_of_rows_and_pieces(rows, pieces, steps_of):
    """Takes several steps; the last extends past the rows, and pieces may be odd in number."""
    case = Case((rows,), pieces * 128)
    config = UnitaryConfig(n1=pieces, rows=steps_of, at_once=4)
    found = direct(case, F32, configs=(config, config))
    assert max(errors(found, case).values()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [8, 64, 1024])
def test_errors_of_gradients_summed_over_rows(rows, dtype):
    case = Case((rows,), 256)
    lost = errors(direct(case, dtype), case)
    summed = 4 * tolerance(F32, rows) if dtype == F32 else 2e-5
    assert max(lost["dphases"], lost["dreflections"]) < summed


@pytest.mark.slow
def test_simulated_tpu_finds_no_race_and_no_unwritten_read(simulated_tpu):
    case = KERNEL_CASES["an odd number of pieces, ragged rows"]
    x, g, *parameters = case.arrays()
    y, transpose = jax.vjp(unitary_product, *map(jnp.asarray, (x, *parameters)))
    assert max(errors([y, *transpose(jnp.asarray(g))], case).values()) < 1e-6


@pytest.mark.slow
def test_simulated_tpu_with_pieces_padded_to_whole_sublanes(simulated_tpu):
    case = KERNEL_CASES["pieces beyond one group of sublanes"]
    x, g, *parameters = case.arrays()
    y, transpose = jax.vjp(unitary_product, *map(jnp.asarray, (x, *parameters)))
    assert max(errors([y, *transpose(jnp.asarray(g))], case).values()) < 1e-6


def test_interpret_runs_the_kernel(kernel_log):
    x, _, *parameters = map(jnp.asarray, Case((8,), 128).arrays())

    def text(implementation: str) -> str:
        def both(*arrays):
            y, transpose = jax.vjp(
                lambda *a: unitary_product(*a, implementation=implementation), *arrays
            )
            return y, transpose(y)

        return str(jax.make_jaxpr(both)(x, *parameters))

    found = text("interpret")
    assert found.count("pallas_call[") == 2
    assert "unitary_product_backward" in found
    assert sum(": interpret" in line for line in kernel_log) == 2
    assert "pallas_call" not in text("xla") + text("auto")


@pytest.mark.slow
def test_under_jax_transformations():
    """Interprets the kernel under vmap, scan and remat together, and in shard_map."""
    x, _, *parameters = map(jnp.asarray, Case((8, 8), 128).arrays())
    product = functools.partial(unitary_product, implementation="interpret")
    layers = [jnp.stack([p, 0.5 * p]) for p in parameters]

    def stacked(product, x):
        step = jax.checkpoint(lambda x, layer: (product(x, *layer), None))
        return jnp.sum(jax.vmap(lambda x: jax.lax.scan(step, x, layers)[0])(x)[..., :7] ** 2)

    found, expected = (
        jax.jit(jax.grad(functools.partial(stacked, p)))(x)
        for p in (product, functools.partial(unitary_product, implementation="xla"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda x: product(x, *parameters),
        mesh=mesh,
        in_specs=jax.P("rows"),
        out_specs=jax.P("rows"),
        check_vma=False,
    )
    wanted = reference.forward(*map(np.asarray, (x, *parameters)))
    np.testing.assert_allclose(jax.jit(spread)(x), wanted, atol=1e-5)


# The transform.


@pytest.mark.parametrize(("n1", "n2"), [(3, 5), (4, 8), (7, 1), (1, 6), (13, 2)])
def test_two_small_transforms_and_twiddles_equal_one_large_one(n1, n2):
    n = n1 * n2
    rng = np.random.default_rng(0)
    z = rng.normal(size=n) + 1j * rng.normal(size=n)
    twiddles = fourier.twiddles(n1, n2, n1).astype(np.float64)
    inner = fourier.matrix(n1, n1) @ z.reshape(n1, n2) * (twiddles[0] + 1j * twiddles[1])
    found = inner @ fourier.matrix(n2, n2)
    expected = np.fft.fft(z, norm="ortho")
    by_frequency = np.asarray(fourier.by_frequency(jnp.arange(n, dtype=F32), n1), np.int64)
    np.testing.assert_allclose(found, expected[by_frequency], atol=1e-6)


def test_index_and_frequency_orders_have_inverses():
    a = jnp.arange(30.0).reshape(2, 15)
    np.testing.assert_array_equal(fourier.from_index(fourier.by_index(a, 3)), a)
    np.testing.assert_array_equal(fourier.from_frequency(fourier.by_frequency(a, 3)), a)


# Through the TPU compiler.


@pytest.mark.fast("v6e")
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_compiles_with_one_read_and_one_write(tpu, chip):
    """Compiles one shape for the chip with the least VMEM and for the newest."""
    for program in bench.programs(widths=(2048,), dtypes=(BF16,), rows=512):
        found = measure(chip, program, "pallas")
        assert found.pallas
        assert found.traffic.total < 1.05 * program.minimum


def test_runs_on_each_device_of_a_tpu_mesh(tpu, kernel_log):
    mesh = jax.sharding.Mesh(np.reshape(tpu.devices("v5e"), (4,)), ("rows",))

    def shape(dtype, *axes, spec=()):
        placed = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(axes, dtype, sharding=placed)

    arrays = (
        shape(BF16, 4, 16, 512, spec=("rows",)),
        shape(F32, 3, 256),
        shape(F32, 2, 2, 256),
    )

    def loss(*arrays):
        return jnp.sum(unitary_product(*arrays).astype(F32) ** 2)

    with jax.set_mesh(mesh), use_layout(Layout(("rows",))):
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert found.count('custom_call_target="tpu_custom_call"') == 2
    assert sum("on tpu: pallas" in line for line in kernel_log) == 2


def test_unsupported_width_falls_back_to_xla_or_is_rejected(kernel_log):
    x = jax.ShapeDtypeStruct((64, 960), jnp.float32)
    parameters = [
        jax.ShapeDtypeStruct((3, 480), jnp.float32),
        jax.ShapeDtypeStruct((2, 2, 480), jnp.float32),
    ]
    reason = "480 complex numbers"

    def lowered(implementation):
        product = functools.partial(unitary_product, implementation=implementation)
        return jax.jit(product).trace(x, *parameters).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" not in lowered("auto")
    assert f"on tpu: xla ({reason}" in kernel_log[-1]
    with pytest.raises(KernelError, match=reason):
        lowered("pallas")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_xla_form_compiles(tpu, chip):
    """XLA's form runs at other widths, and when the map is merged into a kernel."""
    x = jax.ShapeDtypeStruct((64, 960), jnp.float32)
    phases = jax.ShapeDtypeStruct((3, 480), jnp.float32)
    reflections = jax.ShapeDtypeStruct((2, 2, 480), jnp.float32)

    def both(*arrays):
        y, transpose = jax.vjp(unitary_product, *arrays)
        return y, transpose(y)

    assert not tpu.runs_pallas(compile_for(chip, both, x, phases, reflections))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("width", MODELS_BY_WIDTH)
def test_compiles_at_every_width(tpu, chip, width):
    for program in bench.programs(widths=(width,), dtypes=(BF16,)):
        found = measure(chip, program, "pallas")
        assert found.pallas, program
        assert found.traffic.total < 1.05 * program.minimum, program
        assert found.accessed < 1.05 * program.minimum, program


# Configurations.


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_chosen_configurations_fit_every_chip(dtype, backward):
    precision = resolve_precision(None, dtype)
    for width in MODELS_BY_WIDTH:
        for chip, there in VMEM_BYTES.items():
            choose = functools.partial(
                choose_config,
                n=width // 2,
                rows=8192,
                dtype=dtype,
                backward=backward,
                precision=precision,
                vmem_bytes=there,
            )
            if backward and dtype == F32 and chip == "v4" and width > 50_000:
                # No configuration exists for these widths on this chip only.
                with pytest.raises(ValueError, match=r"need .* MiB"):
                    choose()
                continue
            config = choose()
            assert config.n == width // 2
            config.check(dtype, backward=backward, precision=precision, vmem_bytes=there)


def test_rejects_a_configuration_that_exceeds_the_chip_before_compiling():
    config = UnitaryConfig(n1=208, rows=128, at_once=1)
    match = r"128 rows of 53248 .* need \d+\.\d MiB .*14\.0 MiB"
    with pytest.raises(ValueError, match=match):
        config.check(BF16, backward=False, precision=HIGH, vmem_bytes=16 * MIB)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((256, 53248), BF16), ((3, 26624), F32), ((2, 2, 26624), F32))
    ]
    forward = functools.partial(kernel.forward, precision=None, interpret=False, config=config)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(forward, *shapes)


def test_few_rows_give_small_steps():
    config = choose_config(n=2048, rows=3, dtype=BF16, backward=False, precision=HIGH)
    assert config.rows == 8
    with pytest.raises(ValueError, match=r"100 complex numbers.*128"):
        choose_config(n=100, rows=3, dtype=BF16, backward=False, precision=HIGH)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n1": 0}, r"n1 is 0\b"),
        ({"rows": 12}, r"rows is 12\b.*8"),
        ({"at_once": 3}, r"at_once is 3\b.*16"),
        ({"buffers": 3}, r"buffers is 3\b"),
    ],
)
def test_rejects_invalid_configurations(wrong, match):
    with pytest.raises(ValueError, match=match):
        UnitaryConfig(**{"n1": 2, "rows": 16, "at_once": 8, **wrong})


def test_vmem_of_a_step():
    """Pins the sizes that the reasons in `config` rest on."""
    config = UnitaryConfig(n1=43, rows=16, at_once=2)
    assert (config.n, config.padded, config.pitch) == (5504, 48, 49)
    block, table = 16 * 11008 * 2, 48 * 128 * 4
    scratch = 2 * 16 * 49 * 128 * 4
    matrices = (96 * 96 + 256 * 256) * 4
    assert config.vmem_bytes(BF16, backward=False, precision=HIGH) == (
        4 * block + scratch + matrices + 12 * table + 6 * 2 * table * 2
    )
    assert config.vmem_bytes(F32, backward=True, precision=HIGHEST) > config.vmem_bytes(
        BF16, backward=True, precision=HIGH
    )


def test_compiles_for_a_tpu_on_a_machine_without_one(tpu):
    x = jax.ShapeDtypeStruct((16, 512), BF16)
    parameters = [jax.ShapeDtypeStruct(s, F32) for s in ((3, 256), (2, 2, 256))]
    assert tpu.runs_pallas(compile_for("v5p", unitary_product, x, *parameters))
