"""The unitary product in plain complex128, as a reference for tests.

It shares no code with the implementations: it builds the matrix U from its factors, and computes
the gradient of each factor in turn.
"""

import numpy as np


def fourier(n: int) -> np.ndarray:
    """Returns the unitary discrete Fourier transform [n, n], acting on columns."""
    index = np.arange(n)
    return np.exp(-2j * np.pi * np.outer(index, index) / n) / np.sqrt(n)


def householder(v: np.ndarray) -> np.ndarray:
    """Returns the reflection I - 2 v v* / (v* v) [n, n] of a complex vector [n]."""
    return np.eye(v.size) - 2 * np.outer(v, v.conj()) / np.vdot(v, v).real


def dense(phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    """Returns U = D₃ R₂ F⁻¹ D₂ R₁ F D₁ [n, n], acting on columns.

    Args:
      phases: [3, n].
      reflections: [2, 2, n].
    """
    f = fourier(phases.shape[-1])
    d1, d2, d3 = (np.diag(np.exp(1j * angles)) for angles in phases.astype(np.float64))
    r1, r2 = (householder(v) for v in as_complex(reflections))
    return d3 @ r2 @ f.conj().T @ d2 @ r1 @ f @ d1


def forward(x: np.ndarray, phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    """Returns y = U x [..., 2 n], float64, for rows of real parts and then imaginary parts."""
    return as_halves(from_halves(x) @ dense(phases, reflections).T)


def backward(
    x: np.ndarray, g: np.ndarray, phases: np.ndarray, reflections: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (dx [..., 2 n], dphases [3, n], dreflections [2, 2, n]), float64, for the gradient g.

    The gradient of a complex number is held as that of its real part plus i times that of its
    imaginary part. The backward pass of a linear map is then its adjoint.
    """
    n = phases.shape[-1]
    f = fourier(n)
    v1, v2 = as_complex(reflections)
    # The input of each factor as columns [n, rows], from the first factor to the last.
    start = from_halves(x).reshape(-1, n).T
    phase_factors = np.exp(1j * phases.astype(np.float64))[..., None]
    phased = phase_factors[0] * start
    spectrum = f @ phased
    reflected = householder(v1) @ spectrum
    phased_spectrum = phase_factors[1] * reflected
    back = f.conj().T @ phased_spectrum
    reflected_back = householder(v2) @ back
    end = phase_factors[2] * reflected_back

    d = from_halves(g).reshape(-1, n).T
    dphase3 = _phase_gradient(end, d)
    d = phase_factors[2].conj() * d
    dv2 = _vector_gradient(back, d, v2)
    d = f @ (householder(v2) @ d)
    dphase2 = _phase_gradient(phased_spectrum, d)
    d = phase_factors[1].conj() * d
    dv1 = _vector_gradient(spectrum, d, v1)
    d = f.conj().T @ (householder(v1) @ d)
    dphase1 = _phase_gradient(phased, d)
    d = phase_factors[0].conj() * d

    dreflections = np.stack([[dv.real, dv.imag] for dv in (dv1, dv2)])
    dx = as_halves(d.T).reshape(np.shape(x))
    return dx, np.stack([dphase1, dphase2, dphase3]), dreflections


def as_complex(parts: np.ndarray) -> np.ndarray:
    """Combines real and imaginary parts [..., 2, n] to complex numbers [..., n]."""
    parts = np.asarray(parts, np.float64)
    return parts[..., 0, :] + 1j * parts[..., 1, :]


def from_halves(x: np.ndarray) -> np.ndarray:
    """Combines real parts and then imaginary parts [..., 2 n] to complex numbers [..., n]."""
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return real + 1j * imaginary


def as_halves(z: np.ndarray) -> np.ndarray:
    """Splits complex numbers into halves; the inverse of `from_halves`."""
    return np.concatenate([z.real, z.imag], axis=-1)


def _phase_gradient(after: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Returns the gradient of θ in z to e^(iθ) z, from the result and its gradient [n, rows]."""
    # The derivative of the result with respect to the angle is i times the result.
    return np.sum(np.real(d.conj() * 1j * after), axis=-1)


def _vector_gradient(before: np.ndarray, d: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the gradient of v in z to z - 2 v (v* z) / (v* v), summed row by row."""
    squared = np.vdot(v, v).real
    total = np.zeros_like(v)
    for z, dz in zip(before.T, d.T, strict=True):
        along, dalong = np.vdot(v, z), np.vdot(v, dz)
        total += -2 / squared * (np.conj(along) * dz + np.conj(dalong) * z)
        total += 4 / squared**2 * np.real(np.conj(dalong) * along) * v
    return total
