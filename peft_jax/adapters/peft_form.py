"""Converts an adapter of one kernel to Hugging Face PEFT's tensors, and back.

PEFT's layers multiply column vectors, so its matrices are transposed. Each method has its form in
its own module.
"""

import abc
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a module's tensors, by name suffix."""


class PeftForm(abc.ABC):
    """PEFT's form of one method's arrays for one kernel.

    Attributes:
      peft_type: PEFT's name of the method.
      names: Name suffixes of the tensors.
      exact: Whether `restore` inverts `export` bit for bit.
      patterns: Settings that may differ between modules, and the names under which PEFT's
        configuration has the differences.
    """

    peft_type: str
    names: tuple[str, ...]
    exact: bool
    patterns: Mapping[str, str] = MappingProxyType({})

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the method's settings in `adapter_config.json`."""

    @abc.abstractmethod
    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns the shapes of the tensors of a kernel [d_in, d_out]."""

    @abc.abstractmethod
    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the adapter's arrays, trainable and constant, to PEFT's tensors.

        Raises:
          NoPeftFormError: These values have no PEFT form.
        """

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Converts PEFT's tensors to the adapter's (trainable, constant) arrays."""
        raise NotImplementedError(f"{type(self).__name__} cannot be restored: it is not exact")


class NoPeftFormError(Exception):
    """Raised for an adapter without a PEFT form; the message says why."""


def nbytes(shapes: Shapes) -> int:
    """Returns the bytes of a module's tensors in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())
