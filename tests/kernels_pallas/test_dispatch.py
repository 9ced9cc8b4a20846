"""Which implementation is chosen, what is said of it, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.checks import check_real
from kernels_pallas.dispatch import (
    Choice,
    KernelError,
    Operation,
    choose,
    resolve,
    using,
)

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def test_what_is_asked_for_by_name_is_said(said):
    block_rotation(jnp.ones((3, 4)), jnp.ones((2, 2, 2)), implementation="xla")
    assert said == [
        "block_rotation(float32[3, 4], float32[2, 2, 2]) on any platform: xla, because it was"
        " asked for"
    ]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_numbers_that_are_not_real_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x must be real floating.*but is {jnp.dtype(dtype).name}"):
        check_real(x=jnp.ones((2, 4), dtype))


def double(x, *, by):
    return (by * x,)


def never(*arrays, **settings):
    raise AssertionError("a kernel for another platform was traced")


def only_wide(platform, x, *, by):
    return None if x.shape[-1] >= 8 else f"{x.shape[-1]} features are too few on {platform}"


DOUBLE = Operation(name="double", xla=double, tpu=never, refuse=only_wide, rowwise=(0,))
SHY = Operation(name="shy", xla=double, gpu=never, hesitate=lambda *_, **__: "it is shy")


@pytest.mark.parametrize(
    ("requested", "platform", "parts", "expected"),
    [
        ("auto", "tpu", 1, Choice("pallas", "the default on tpu")),
        ("auto", "cpu", 1, Choice("xla", "there is no Pallas kernel of it for cpu")),
        ("auto", "cuda", 1, Choice("xla", "there is no Pallas kernel of it for cuda")),
        ("xla", "tpu", 1, Choice("xla", "it was asked for")),
        ("pallas", "tpu", 1, Choice("pallas", "it was asked for")),
        ("interpret", "cpu", 1, Choice("interpret", "it was asked for")),
    ],
)
def test_the_choice(requested, platform, parts, expected):
    assert choose(DOUBLE, requested, (X,), {"by": 2}, platform=platform, parts=parts) == expected


def test_shapes_and_devices_decide_too():
    narrow = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    found = choose(DOUBLE, "auto", (narrow,), {"by": 2}, platform="tpu", parts=1)
    assert found == Choice("xla", "2 features are too few on tpu")
    found = choose(DOUBLE, "auto", (X,), {"by": 2}, platform="tpu", parts=4)
    assert found.implementation == "xla"
    assert "spread over 4 devices" in found.why
    # What "auto" would rather not take can be asked for.
    assert choose(SHY, "auto", (X,), {"by": 2}, platform="cuda", parts=1).why == "it is shy"
    assert choose(SHY, "pallas", (X,), {"by": 2}, platform="cuda", parts=1).implementation != "xla"


@pytest.mark.parametrize(
    ("requested", "shape", "platform", "parts", "message"),
    [
        ("pallas", (4, 8), "cpu", 1, "no Pallas kernel of it for cpu. 'auto' and 'xla' work there"),
        (
            "pallas",
            (4, 2),
            "tpu",
            1,
            "float32.4, 2., by=2. cannot run as 'pallas'.* too few on tpu",
        ),
        ("interpret", (4, 2), "cpu", 1, "2 features are too few on tpu"),
        ("pallas", (4, 8), "tpu", 4, "spread over 4 devices and nothing says how"),
    ],
)
def test_what_cannot_work_is_refused(requested, shape, platform, parts, message):
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32),)
    with pytest.raises(KernelError, match=message):
        choose(DOUBLE, requested, shapes, {"by": 2}, platform=platform, parts=parts)


def test_the_log_says_it_once(said):
    x = np.ones((4, 8), np.float32)
    for _ in range(2):
        (y,) = jax.jit(lambda x: DOUBLE(x, implementation="auto", by=2))(x)
        np.testing.assert_array_equal(y, 2 * x)
    assert said == [
        "double(float32[4, 8], by=2) on cpu: xla, because there is no Pallas kernel of it for cpu"
    ]


def test_an_error_when_lowered_comes_through():
    with pytest.raises(KernelError, match="no Pallas kernel of it for cpu"):
        jax.jit(lambda x: DOUBLE(x, implementation="pallas", by=2))(np.ones((4, 8), np.float32))


def test_outside_of_jit_and_under_vmap():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    np.testing.assert_array_equal(DOUBLE(x, implementation="auto", by=3)[0], 3 * x)
    mapped = jax.vmap(lambda row: DOUBLE(row, implementation="auto", by=3)[0], in_axes=1)
    np.testing.assert_array_equal(mapped(x), 3 * x.T)


def test_the_innermost_explicit_choice_counts():
    assert resolve(None) == "auto"
    with using("interpret"):
        assert resolve(None) == "interpret"
        with using("xla"):
            assert resolve(None) == "xla"
            assert resolve("pallas") == "pallas"
        assert resolve(None) == "interpret"
    assert resolve(None) == "auto"
    with pytest.raises(ValueError, match="'fast'; it must be one of auto, xla, pallas, interpret"):
        resolve("fast")
    with pytest.raises(ValueError, match="'fast'"), using("fast"):
        pass


def test_no_pallas_is_imported_where_none_runs():
    import subprocess
    import sys

    code = (
        "import sys, jax.numpy as jnp; from kernels_pallas.block_rotation import block_rotation;"
        "block_rotation(jnp.ones((2, 8)), jnp.ones((2, 4, 4)));"
        "assert not any('pallas.tpu' in name or 'mosaic' in name for name in sys.modules"
        " if name.startswith('jax.experimental')), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
