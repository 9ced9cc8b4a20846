"""The unitary product written a second time, in complex128 and as plainly as can be.

It shares nothing with the implementations: the matrix U is built from its factors and multiplied
by; its gradients are those of its factors, one by one.
"""

import numpy as np


def fourier(n: int) -> np.ndarray:
    """The unitary discrete Fourier transform [n, n], acting on columns."""
    index = np.arange(n)
    return np.exp(-2j * np.pi * np.outer(index, index) / n) / np.sqrt(n)


def householder(v: np.ndarray) -> np.ndarray:
    """The reflection I - 2 v v* / (v* v) [n, n] of a complex vector [n]."""
    return np.eye(v.size) - 2 * np.outer(v, v.conj()) / np.vdot(v, v).real


def dense(phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    """U = D₃ R₂ F⁻¹ D₂ R₁ F D₁ [n, n], acting on columns.

    Args:
      phases: [3, n].
      reflections: [2, 2, n].
    """
    f = fourier(phases.shape[-1])
    d1, d2, d3 = (np.diag(np.exp(1j * angles)) for angles in phases.astype(np.float64))
    r1, r2 = (householder(v) for v in as_complex(reflections))
    return d3 @ r2 @ f.conj().T @ d2 @ r1 @ f @ d1


def forward(x: np.ndarray, phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    """The product y = U x [..., 2 n], float64, of rows of real parts and then imaginary parts."""
    return as_halves(from_halves(x) @ dense(phases, reflections).T)


def backward(
    x: np.ndarray, g: np.ndarray, phases: np.ndarray, reflections: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx [..., 2 n], dphases [3, n], dreflections [2, 2, n]) of the sum of y times g, float64.

    A gradient with respect to complex numbers is held as that of the real parts plus i times that
    of the imaginary parts, and goes backwards through a linear map as through its adjoint.
    """
    n = phases.shape[-1]
    f = fourier(n)
    v1, v2 = as_complex(reflections)
    # As columns [n, rows]: what comes into each factor, from the first to the last.
    start = from_halves(x).reshape(-1, n).T
    turns = np.exp(1j * phases.astype(np.float64))[..., None]
    phased = turns[0] * start
    spectrum = f @ phased
    reflected = householder(v1) @ spectrum
    phased_spectrum = turns[1] * reflected
    back = f.conj().T @ phased_spectrum
    reflected_back = householder(v2) @ back
    end = turns[2] * reflected_back

    d = from_halves(g).reshape(-1, n).T
    dphase3 = _phase_gradient(end, d)
    d = turns[2].conj() * d
    dv2 = _vector_gradient(back, d, v2)
    d = f @ (householder(v2) @ d)
    dphase2 = _phase_gradient(phased_spectrum, d)
    d = turns[1].conj() * d
    dv1 = _vector_gradient(spectrum, d, v1)
    d = f.conj().T @ (householder(v1) @ d)
    dphase1 = _phase_gradient(phased, d)
    d = turns[0].conj() * d

    dreflections = np.stack([[dv.real, dv.imag] for dv in (dv1, dv2)])
    dx = as_halves(d.T).reshape(np.shape(x))
    return dx, np.stack([dphase1, dphase2, dphase3]), dreflections


def as_complex(parts: np.ndarray) -> np.ndarray:
    """[..., 2, n] real parts and imaginary parts to [..., n]."""
    parts = np.asarray(parts, np.float64)
    return parts[..., 0, :] + 1j * parts[..., 1, :]


def from_halves(x: np.ndarray) -> np.ndarray:
    """[..., 2 n] real parts and then imaginary parts to [..., n]."""
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return real + 1j * imaginary


def as_halves(z: np.ndarray) -> np.ndarray:
    """`from_halves`'s inverse."""
    return np.concatenate([z.real, z.imag], axis=-1)


def _phase_gradient(after: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Of the angles of z to e^(iθ) z, from what comes out and its gradient, [n, rows]."""
    # The change of what comes out with the angle is i times itself.
    return np.sum(np.real(d.conj() * 1j * after), axis=-1)


def _vector_gradient(before: np.ndarray, d: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Of the vector of z to z - 2 v (v* z) / (v* v), summed over rows one at a time."""
    squared = np.vdot(v, v).real
    total = np.zeros_like(v)
    for z, dz in zip(before.T, d.T, strict=True):
        along, dalong = np.vdot(v, z), np.vdot(v, dz)
        total += -2 / squared * (np.conj(along) * dz + np.conj(dalong) * z)
        total += 4 / squared**2 * np.real(np.conj(dalong) * along) * v
    return total
