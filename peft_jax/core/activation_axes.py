"""How activations lie on the mesh, for kernels that the compiler cannot spread over devices itself.

Whoever runs a model on a mesh says how (`peft_jax.parallel.on_mesh`), a model's linear maps say
which of its axes their inputs have (`input_axis`), and the kernels of `kernels_pallas` are told.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

from kernels_pallas.layout import Layout, use_layout


@dataclasses.dataclass(frozen=True)
class ActivationAxes:
    """The axes of the mesh that activations [rows, ..., features] are cut along.

    Attributes:
      rows: those along the rows of the batch.
      features: those along the features, by the logical name of the features' axis.
    """

    rows: tuple[str, ...]
    features: Mapping[str, tuple[str, ...]]


_axes = contextvars.ContextVar[ActivationAxes | None]("peft_jax_activation_axes", default=None)


@contextlib.contextmanager
def sharded_activations(axes: ActivationAxes) -> Iterator[None]:
    """Models traced within have their activations cut like this."""
    token = _axes.set(axes)
    try:
        yield
    finally:
        _axes.reset(token)


@contextlib.contextmanager
def input_axis(name: str) -> Iterator[None]:
    """The kernels called within get activations whose features are this logical axis."""
    axes = _axes.get()
    layout = None if axes is None else Layout(axes.rows, axes.features.get(name, ()))
    with use_layout(layout):
        yield
