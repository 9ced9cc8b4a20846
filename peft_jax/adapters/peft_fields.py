"""Converts methods whose arrays and settings PEFT has under other names."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peft_jax.adapters.peft_form import PeftForm, Shapes, plain_number, setting

if TYPE_CHECKING:
    from peft_jax.adapters.method import TrainingMethod


@dataclasses.dataclass(frozen=True)
class RenamingForm(PeftForm):
    """A form whose tensors are the method's arrays, and whose settings are the method's.

    Attributes:
      arrays: Names of the arrays, in the order of `names`.
      constant: Those of `arrays` that are constant.
      transposed: Whether tensors are transposed.
      fields: The method's fields by PEFT's name of the setting, with PEFT's default. A default that
        is an integer is written as one where possible.
      written: Settings that are written with fixed values.
      read_as: Values of the method's other fields when an adapter of PEFT is read.
    """

    arrays: ClassVar[tuple[str, ...]]
    constant: ClassVar[tuple[str, ...]] = ()
    transposed: ClassVar[bool] = False
    fields: ClassVar[Mapping[str, tuple[str, Any]]]
    written: ClassVar[Mapping[str, Any]] = {}
    read_as: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> "TrainingMethod":
        """Returns the method with the settings of the configuration."""
        del modules
        method: Any = next(f.type for f in dataclasses.fields(cls) if f.name == "method")
        types = {field.name: field.type for field in dataclasses.fields(method)}
        found = {}
        for name, (field, default) in cls.fields.items():
            value = setting(config, name, default)
            found[field] = float(value) if types[field] is float else value
        return method(**found, **cls.read_as)

    def settings(self) -> dict[str, Any]:
        """Returns the method's settings by PEFT's names."""
        found = dict(self.written)
        for name, (field, default) in self.fields.items():
            value = getattr(self.method, field)
            whole = isinstance(value, float) and isinstance(default, int)
            found[name] = plain_number(value) if whole else value
        return found

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames the arrays, and transposes them if PEFT has them so."""
        pairs = zip(self.names, self.arrays, strict=True)
        return {tensor: self._turn(arrays[array]) for tensor, array in pairs}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Renames the tensors, and transposes them back."""
        trainable: dict[str, Any] = {}
        constant: dict[str, Any] = {}
        for tensor, array in zip(self.names, self.arrays, strict=True):
            own = constant if array in self.constant else trainable
            own[array] = self._turn(tensors[tensor])
        return trainable, constant

    def _turn(self, array: np.ndarray) -> np.ndarray:
        return array.T if self.transposed else array
