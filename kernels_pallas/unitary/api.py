"""The unitary product's public function."""

import jax
from jaxtyping import Array, Float

from kernels_pallas.checks import check_real
from kernels_pallas.dispatch import report_xla, resolve
from kernels_pallas.layout import spread
from kernels_pallas.unitary import vjp, xla


def unitary_product(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """The unitary map U = D₃ R₂ F⁻¹ D₂ R₁ F D₁ of complex vectors held as real ones.

    The first half of the features is read as real parts and the second as imaginary parts of
    n = d / 2 complex numbers. D are phases, R Householder reflections, F the unitary discrete
    Fourier transform. Source: Arjovsky, Shah and Bengio, 2015, arXiv 1511.06464, eq. 6; their
    fixed permutation is the identity here, without which no choice of the other factors would
    start as the identity.

    Args:
      x: activations [..., d], d even.
      phases: the angles of D₁, D₂, D₃, radians, [3, n], float32.
      reflections: the vectors of R₁ and R₂, real parts and imaginary parts, [2, 2, n], float32;
        their lengths do not matter, as long as they are not zero.
      precision: of the transforms in the Pallas kernels; by default as good as float32 for the
        dtype of `x` (`kernels_pallas.unitary.config.resolve_precision`). XLA's form is always in
        float32.
      implementation: one of `kernels_pallas.dispatch.IMPLEMENTATIONS`; by default what
        `kernels_pallas.dispatch.using` says, or "auto". "xla" can be differentiated any number of
        times and forwards, the others once and backwards.

    Returns:
      [..., d] in the dtype of `x`. Norms are preserved.

    Raises:
      TypeError: when the arrays are no real floating-point numbers.
      ValueError: when phases or reflections are not as described, or d is not 2 n.
      KernelError: the implementation asked for cannot work where this is lowered.
    """
    check_real(x=x, phases=phases, reflections=reflections)
    n = phases.shape[-1]
    for name, given, wanted in (
        ("phases", phases.shape, (3, n)),
        ("reflections", reflections.shape, (2, 2, n)),
    ):
        if given != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, but are {list(given)}")
    if x.shape[-1] != 2 * n:
        raise ValueError(f"{n} complex features are {2 * n} real ones; the input has {x.shape[-1]}")
    chosen = resolve(implementation)
    if chosen == "xla":
        report_xla("unitary_product", x, phases, reflections)
        return xla.forward(x, phases, reflections, precision=precision)[0]
    return spread(
        lambda *arrays: vjp.turn(*arrays, precision, chosen),
        x,
        phases,
        reflections,
        blocks=1,
        feature_axes=(None, None),
        implementation=chosen,
    )
