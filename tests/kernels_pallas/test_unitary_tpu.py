"""The unitary product's TPU kernels: on a simulated TPU, and through the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.cases import tolerance
from kernels_pallas.chips import MIB, VMEM_BYTES
from kernels_pallas.dispatch import KernelError
from kernels_pallas.layout import Layout, laid_out
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for
from kernels_pallas.traffic import measure
from kernels_pallas.unitary import bench, fourier, reference, unitary_product
from kernels_pallas.unitary import tpu as kernel
from kernels_pallas.unitary.cases import KERNEL_CASES, MODEL_WIDTHS, Case
from kernels_pallas.unitary.config import UnitaryConfig, choose_config, resolve_precision

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
DEFAULT, HIGH, HIGHEST = (
    jax.lax.Precision.DEFAULT,
    jax.lax.Precision.HIGH,
    jax.lax.Precision.HIGHEST,
)
NAMES = ("y", "dx", "dphases", "dreflections")


def direct(case: Case, dtype, *, precision=None, configs=(None, None)) -> list[jax.Array]:
    """y, dx, dphases, dreflections, by the kernels as they are, interpreted."""
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
    """Of each result, the error as a share of the result, in the root mean square."""
    return {
        name: float(np.linalg.norm(np.asarray(one, np.float64) - wanted) / np.linalg.norm(wanted))
        for name, one, wanted in zip(NAMES, found, expected_of(case), strict=True)
    }


@pytest.mark.parametrize("case", ["one piece, no padding of rows", "one row"])
def test_the_product_and_every_gradient(case):
    found = direct(KERNEL_CASES[case], F32)
    assert max(errors(found, KERNEL_CASES[case]).values()) < 1e-6


@pytest.mark.parametrize("case", ["an odd number of pieces, ragged rows"])
def test_half_precision_activations_lose_no_more_than_their_own_rounding(case):
    found = direct(KERNEL_CASES[case], BF16)
    assert [one.dtype for one in found] == [BF16, BF16, F32, F32]
    lost = errors(found, KERNEL_CASES[case])
    # Numbers of 8 bits, rounded: 2^-9 / √3 where they stand, on average over an octave.
    assert max(lost["y"], lost["dx"]) < 1.75e-3
    assert max(lost["dphases"], lost["dreflections"]) < 2e-5


@pytest.mark.slow
def test_the_precision_can_be_given_up():
    case = KERNEL_CASES["one piece, no padding of rows"]
    lost = errors(direct(case, F32, precision=DEFAULT), case)
    assert all(1e-3 < error < 1e-2 for error in lost.values())
    lost = errors(direct(case, F32, precision=HIGH), case)
    assert all(1e-7 < error < 2e-5 for error in lost.values())


@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 40), pieces=st.integers(1, 4), steps_of=st.sampled_from([8, 16]))
def test_any_number_of_rows_and_pieces(rows, pieces, steps_of):
    """Several steps, of which the last ends beyond the rows; odd numbers of pieces too."""
    case = Case((rows,), pieces * 128)
    config = UnitaryConfig(n1=pieces, rows=steps_of, at_once=4)
    found = direct(case, F32, configs=(config, config))
    assert max(errors(found, case).values()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [8, 64, 1024])
def test_errors_by_the_number_of_rows_that_are_summed(rows, dtype):
    case = Case((rows,), 256)
    lost = errors(direct(case, dtype), case)
    summed = 4 * tolerance(F32, rows) if dtype == F32 else 2e-5
    assert max(lost["dphases"], lost["dreflections"]) < summed


def test_on_a_simulated_tpu_nothing_races_and_nothing_unwritten_is_used(simulated_tpu):
    case = KERNEL_CASES["an odd number of pieces, ragged rows"]
    x, g, *parameters = case.arrays()
    y, transpose = jax.vjp(unitary_product, *map(jnp.asarray, (x, *parameters)))
    assert max(errors([y, *transpose(jnp.asarray(g))], case).values()) < 1e-6


@pytest.mark.slow
def test_on_a_simulated_tpu_pieces_are_padded_to_whole_sublanes(simulated_tpu):
    case = KERNEL_CASES["pieces beyond one group of sublanes"]
    x, g, *parameters = case.arrays()
    y, transpose = jax.vjp(unitary_product, *map(jnp.asarray, (x, *parameters)))
    assert max(errors([y, *transpose(jnp.asarray(g))], case).values()) < 1e-6


def test_the_kernel_is_what_runs(said):
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
    assert sum("interpret, because it was asked for" in line for line in said) == 2
    assert "pallas_call" not in text("xla") + text("auto")


def test_inside_of_what_jax_makes_of_it():
    """The kernel under vmap, scan and remat together, and in shard_map, interpreted."""
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
def test_two_small_transforms_and_twiddles_are_one_large_one(n1, n2):
    n = n1 * n2
    rng = np.random.default_rng(0)
    z = rng.normal(size=n) + 1j * rng.normal(size=n)
    twiddles = fourier.twiddles(n1, n2, n1).astype(np.float64)
    inner = fourier.matrix(n1, n1) @ z.reshape(n1, n2) * (twiddles[0] + 1j * twiddles[1])
    found = inner @ fourier.matrix(n2, n2)
    expected = np.fft.fft(z, norm="ortho")
    by_frequency = np.asarray(fourier.by_frequency(jnp.arange(n, dtype=F32), n1), np.int64)
    np.testing.assert_allclose(found, expected[by_frequency], atol=1e-6)


def test_orders_are_undone():
    a = jnp.arange(30.0).reshape(2, 15)
    np.testing.assert_array_equal(fourier.from_index(fourier.by_index(a, 3)), a)
    np.testing.assert_array_equal(fourier.from_frequency(fourier.by_frequency(a, 3)), a)


# The real compiler.


@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_compiles_with_one_read_and_one_write(tpu, chip):
    """One shape in the fast suite, on the chip with the least memory and the newest."""
    for program in bench.programs(widths=(2048,), dtypes=(BF16,), rows=512):
        found = measure(chip, program, "pallas")
        assert found.pallas
        assert found.traffic.total < 1.05 * program.minimum


def test_a_mesh_of_tpus_runs_it_on_each_device(tpu, said):
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

    with jax.set_mesh(mesh), laid_out(Layout(("rows",))):
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert found.count('custom_call_target="tpu_custom_call"') == 2
    assert sum("on tpu: pallas, because" in line for line in said) == 2


def test_widths_no_kernel_holds_are_left_to_xla_or_refused(said):
    x = jax.ShapeDtypeStruct((64, 960), jnp.float32)
    parameters = [
        jax.ShapeDtypeStruct((3, 480), jnp.float32),
        jax.ShapeDtypeStruct((2, 2, 480), jnp.float32),
    ]
    why = "480 complex features are not a multiple of 128, the lanes of a TPU"

    def lowered(implementation):
        product = functools.partial(unitary_product, implementation=implementation)
        return jax.jit(product).trace(x, *parameters).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" not in lowered("auto")
    assert f"xla, because {why}" in said[-1]
    with pytest.raises(KernelError, match=why):
        lowered("pallas")


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_xlas_form_compiles_too(tpu, chip):
    """It is what runs at other widths, and where a map is merged into a kernel."""
    x = jax.ShapeDtypeStruct((64, 960), jnp.float32)
    phases = jax.ShapeDtypeStruct((3, 480), jnp.float32)
    reflections = jax.ShapeDtypeStruct((2, 2, 480), jnp.float32)

    def both(*arrays):
        y, transpose = jax.vjp(unitary_product, *arrays)
        return y, transpose(y)

    assert not tpu.runs_pallas(compile_for(chip, both, x, phases, reflections))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("width", MODEL_WIDTHS)
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
    for width in MODEL_WIDTHS:
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
                # The only widths and chip for which there is none.
                with pytest.raises(ValueError, match=r"need .* MiB of the chip's vector memory"):
                    choose()
                continue
            config = choose()
            assert config.n == width // 2
            config.check(dtype, backward=backward, precision=precision, vmem_bytes=there)


def test_a_configuration_beyond_the_chip_is_refused_before_it_is_compiled():
    config = UnitaryConfig(n1=208, rows=128, at_once=1)
    match = (
        r"128 rows of 53248 features in bfloat16 need \d+\.\d MiB of the chip's vector memory"
        r" forwards, which has 14\.0 MiB to spare"
    )
    with pytest.raises(ValueError, match=match):
        config.check(BF16, backward=False, precision=HIGH, vmem_bytes=16 * MIB)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((256, 53248), BF16), ((3, 26624), F32), ((2, 2, 26624), F32))
    ]
    forward = functools.partial(kernel.forward, precision=None, interpret=False, config=config)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(forward, *shapes)


def test_few_rows_make_small_steps():
    config = choose_config(n=2048, rows=3, dtype=BF16, backward=False, precision=HIGH)
    assert config.rows == 8
    with pytest.raises(ValueError, match="not a multiple of 128, the lanes of a TPU; widths"):
        choose_config(n=100, rows=3, dtype=BF16, backward=False, precision=HIGH)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n1": 0}, "n1 must be at least 1, but is 0"),
        ({"rows": 12}, "rows must be a multiple of 8, but is 12"),
        ({"at_once": 3}, "at_once must divide the rows, 16, but is 3"),
        ({"buffers": 3}, "buffers must be 1 or 2, but is 3"),
    ],
)
def test_configurations_that_cannot_work_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        UnitaryConfig(**{"n1": 2, "rows": 16, "at_once": 8, **wrong})


def test_a_chosen_step_on_the_chip_in_words():
    """The numbers that the configuration's reasons rest on, so that they do not change unseen."""
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


def test_compiled_for_the_tpu_by_name(tpu):
    """What the whole of a model would get: the default, lowered for a TPU, on a machine of CPUs."""
    x = jax.ShapeDtypeStruct((16, 512), BF16)
    parameters = [jax.ShapeDtypeStruct(s, F32) for s in ((3, 256), (2, 2, 256))]
    assert tpu.runs_pallas(compile_for("v5p", unitary_product, x, *parameters))
