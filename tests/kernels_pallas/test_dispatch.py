"""Which implementation of a kernel is chosen, what is logged, and what is rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.dispatch import (
    Choice,
    KernelError,
    Operation,
    choose,
    resolve,
    use_implementation,
)
from kernels_pallas.operand_checks import check_real

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def test_logs_a_requested_implementation(kernel_log):
    block_rotation(jnp.ones((3, 4)), jnp.ones((2, 2, 2)), implementation="xla")
    assert kernel_log == [
        "block_rotation(float32[3, 4], float32[2, 2, 2]) on any platform: xla (requested)"
    ]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_rejects_dtypes_that_are_not_real(dtype):
    with pytest.raises(TypeError, match=f"x is {jnp.dtype(dtype).name} "):
        check_real(x=jnp.ones((2, 4), dtype))


def double(x, *, by):
    return (by * x,)


def never(*arrays, **settings):
    raise AssertionError("a kernel for another platform was traced")


def only_wide(platform, x, *, by):
    return None if x.shape[-1] >= 8 else f"{x.shape[-1]} features are too few on {platform}"


DOUBLE = Operation(name="double", xla=double, tpu=never, unsupported=only_wide, rowwise=(0,))


@pytest.mark.parametrize(
    ("requested", "platform", "expected"),
    [
        ("auto", "tpu", Choice("pallas", "default on tpu")),
        ("auto", "cpu", Choice("xla", "no Pallas kernel for cpu")),
        ("auto", "cuda", Choice("xla", "no Pallas kernel for cuda")),
        ("xla", "tpu", Choice("xla", "requested")),
        ("pallas", "tpu", Choice("pallas", "requested")),
        ("interpret", "cpu", Choice("interpret", "requested")),
    ],
)
def test_request_and_platform_decide(requested, platform, expected):
    assert choose(DOUBLE, requested, (X,), {"by": 2}, platform=platform, devices=1) == expected


def test_shapes_and_devices_decide():
    narrow = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    found = choose(DOUBLE, "auto", (narrow,), {"by": 2}, platform="tpu", devices=1)
    assert found == Choice("xla", "2 features are too few on tpu")
    found = choose(DOUBLE, "auto", (X,), {"by": 2}, platform="tpu", devices=4)
    assert found.implementation == "xla"
    assert "span 4 devices" in found.reason


@pytest.mark.parametrize(
    ("requested", "shape", "platform", "devices", "message"),
    [
        ("pallas", (4, 8), "cpu", 1, "no Pallas kernel for cpu"),
        ("pallas", (4, 2), "tpu", 1, r"double\(float32\[4, 2\], by=2\).*too few on tpu"),
        ("interpret", (4, 2), "cpu", 1, "too few on tpu"),
        ("pallas", (4, 8), "tpu", 4, "span 4 devices"),
    ],
)
def test_rejects_an_implementation_that_cannot_run(requested, shape, platform, devices, message):
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32),)
    with pytest.raises(KernelError, match=f"{message}.*'auto' or 'xla'"):
        choose(DOUBLE, requested, shapes, {"by": 2}, platform=platform, devices=devices)


def test_logs_a_choice_once(kernel_log):
    x = np.ones((4, 8), np.float32)
    for _ in range(2):
        (y,) = jax.jit(lambda x: DOUBLE(x, implementation="auto", by=2))(x)
        np.testing.assert_array_equal(y, 2 * x)
    assert kernel_log == ["double(float32[4, 8], by=2) on cpu: xla (no Pallas kernel for cpu)"]


def test_raises_errors_of_the_lowering():
    with pytest.raises(KernelError, match="no Pallas kernel for cpu"):
        jax.jit(lambda x: DOUBLE(x, implementation="pallas", by=2))(np.ones((4, 8), np.float32))


def test_outside_jit_and_under_vmap():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    np.testing.assert_array_equal(DOUBLE(x, implementation="auto", by=3)[0], 3 * x)
    mapped = jax.vmap(lambda row: DOUBLE(row, implementation="auto", by=3)[0], in_axes=1)
    np.testing.assert_array_equal(mapped(x), 3 * x.T)


def test_innermost_explicit_implementation_wins():
    assert resolve(None) == "auto"
    with use_implementation("interpret"):
        assert resolve(None) == "interpret"
        with use_implementation("xla"):
            assert resolve(None) == "xla"
            assert resolve("pallas") == "pallas"
        assert resolve(None) == "interpret"
    assert resolve(None) == "auto"
    with pytest.raises(ValueError, match=r"'fast'.*auto, xla, pallas, interpret"):
        resolve("fast")
    with pytest.raises(ValueError, match="'fast'"), use_implementation("fast"):
        pass


def test_old_name_warns():
    with pytest.warns(DeprecationWarning, match="use_implementation"):
        assert dispatch.using is use_implementation


def test_programs_without_a_kernel_import_no_pallas():
    import subprocess
    import sys

    code = (
        "import sys, jax.numpy as jnp; from kernels_pallas.block_rotation import block_rotation;"
        "block_rotation(jnp.ones((2, 8)), jnp.ones((2, 4, 4)));"
        "assert not any('pallas.tpu' in name or 'mosaic' in name for name in sys.modules"
        " if name.startswith('jax.experimental')), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
