"""The unitary product's public function, and which operands its kernels support."""

import jax
from jaxtyping import Array, Float

from kernels_pallas.operand_checks import check_real
from kernels_pallas.product import Product
from kernels_pallas.target_device import target_vmem_bytes, unsupported_tpu_dtype
from kernels_pallas.unitary import config, xla


def unitary_product(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """Multiplies complex vectors, held as real ones, by U = D₃ R₂ F⁻¹ D₂ R₁ F D₁.

    The first half of the features holds the real parts of n = d / 2 complex numbers, the second
    half the imaginary parts. D are phases, R Householder reflections, F the unitary discrete
    Fourier transform.

    Source: Arjovsky, Shah and Bengio, 2015, arXiv 1511.06464, eq. 6. Their fixed permutation is the
    identity here; with any other, no choice of the factors would start as the identity.

    Args:
      x: Activations [..., d], d even.
      phases: Angles of D₁, D₂, D₃ in radians, [3, n], float32.
      reflections: Vectors of R₁ and R₂, real and imaginary parts, [2, 2, n], float32. Their lengths
        do not matter but must not be zero.
      precision: Precision of the transforms in the Pallas kernels. The default matches float32
        arithmetic for the dtype of `x` (`kernels_pallas.unitary.config.resolve_precision`). XLA's
        form always computes in float32.
      implementation: One of `kernels_pallas.dispatch.IMPLEMENTATIONS`, or None for the default
        (`kernels_pallas.dispatch.use_implementation`). "xla" can be differentiated any number of
        times, in both modes. The others can be differentiated once, in reverse mode.

    Returns:
      [..., d] in the dtype of `x`. Norms are preserved.

    Raises:
      TypeError: An array is not real floating-point.
      ValueError: Phases or reflections have another shape, or d is not 2 n.
      KernelError: While lowering, if the requested implementation cannot run.
    """
    check_real(x=x, phases=phases, reflections=reflections)
    n = phases.shape[-1]
    for name, given, wanted in (
        ("phases", phases.shape, (3, n)),
        ("reflections", reflections.shape, (2, 2, n)),
    ):
        if given != wanted:
            raise ValueError(f"{name} have shape {list(given)} but must be {list(wanted)}")
    if x.shape[-1] != 2 * n:
        raise ValueError(
            f"x has {x.shape[-1]} features but phases of {n} complex numbers need {2 * n}"
        )
    return _PRODUCT(
        x, phases, reflections, blocks=1, precision=precision, implementation=implementation
    )


def _unsupported(
    platform: str,
    x: jax.ShapeDtypeStruct,
    *parameters: jax.ShapeDtypeStruct,
    backward: bool,
    precision: jax.lax.Precision | None,
) -> str | None:
    del platform, parameters  # there are kernels for TPUs alone; n follows from x
    try:
        config.choose_config(
            n=x.shape[-1] // 2,
            rows=1,
            dtype=x.dtype,
            backward=backward,
            precision=config.resolve_precision(precision, x.dtype),
            vmem_bytes=target_vmem_bytes(),
        )
    except ValueError as error:
        return str(error)
    return unsupported_tpu_dtype(x.dtype)


_PRODUCT = Product(
    name="unitary_product",
    xla=xla,
    tpu="kernels_pallas.unitary.tpu",
    unsupported=_unsupported,
    feature_axes=(None, None),
)
