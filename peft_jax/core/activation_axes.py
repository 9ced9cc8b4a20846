"""Tells Pallas kernels how activations are sharded, because the compiler cannot partition them.

`peft_jax.parallel.on_mesh` sets the mesh axes of activations, and a model's linear maps name the
logical axis of their inputs with `input_axis`. Together they give the kernels of `kernels_pallas`
their layout.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

from kernels_pallas.layout import Layout, use_layout


@dataclasses.dataclass(frozen=True)
class ActivationAxes:
    """Mesh axes that shard activations [rows, ..., features].

    Attributes:
      rows: Mesh axes that shard the batch rows.
      features: Mesh axes that shard the features, by the features' logical axis name.
    """

    rows: tuple[str, ...]
    features: Mapping[str, tuple[str, ...]]


_axes = contextvars.ContextVar[ActivationAxes | None]("peft_jax_activation_axes", default=None)


@contextlib.contextmanager
def sharded_activations(axes: ActivationAxes) -> Iterator[None]:
    """Sets the activation sharding of models that are traced inside the context."""
    token = _axes.set(axes)
    try:
        yield
    finally:
        _axes.reset(token)


@contextlib.contextmanager
def input_axis(name: str) -> Iterator[None]:
    """Sets the logical axis of input features for kernels called inside the context."""
    axes = _axes.get()
    layout = None if axes is None else Layout(axes.rows, axes.features.get(name, ()))
    with use_layout(layout):
        yield
