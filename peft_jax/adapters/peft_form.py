"""Converts an adapter of one kernel to Hugging Face PEFT's tensors, and back.

PEFT's layers multiply column vectors, so its matrices are transposed. Each method has its form in
its own module.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from peft_jax.adapters.method import TrainingMethod

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a module's tensors, by name suffix."""

NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
"""Values that disable a setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """Settings of `adapter_config.json` that a form understands, beside those of every method.

    Attributes:
      read: Types of the settings that are read, by name.
      irrelevant: Settings that do not change what a trained adapter computes.
      fixed: Values of settings that are implemented for these values only.
      why: Ends of the messages that reject a value of a `fixed` setting.
      compared: Settings that contradict this library's own configuration if they are changed.
    """

    read: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    why: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compared: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PeftForm(abc.ABC):
    """PEFT's form of one method's arrays for one kernel.

    Attributes:
      method: The method.
      peft_type: PEFT's name of the method.
      marks: Settings that tell adapters of this form from others of the same type.
      names: Name suffixes of the tensors.
      integers: Those of `names` that hold integers.
      shared_names: Names of the tensors that all modules share and that a file must have.
      exact: Whether `restore` inverts `export` bit for bit.
      understood: Settings that the form understands.
      only_bias: Value of the setting `bias` that trains the biases of the adapted modules; empty
        for types without that setting.
      saves_modules: Whether the type has the setting `modules_to_save`.
      of_embeddings: Whether it is the form of embeddings.
      copies: Name of the copy of a module that PEFT trains in place of the module itself; empty for
        methods that add tensors.
      patterns: Settings that may differ between modules, and the names under which PEFT's
        configuration has the differences.
      module_lists: Settings that list modules, and the attribute of the method that is true for
        the listed ones.
    """

    method: Any
    peft_type: ClassVar[str]
    marks: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    names: ClassVar[tuple[str, ...]]
    integers: ClassVar[tuple[str, ...]] = ()
    shared_names: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool]
    understood: ClassVar[PeftSettings]
    only_bias: ClassVar[str] = ""
    saves_modules: ClassVar[bool] = True
    of_embeddings: ClassVar[bool] = False
    copies: ClassVar[str] = ""
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({})
    module_lists: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether adapters with this configuration have this form."""
        marks = {"peft_type": cls.peft_type, **cls.marks}
        return all(config.get(name) == value for name, value in marks.items())

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> "TrainingMethod":
        """Returns the method of a PEFT adapter.

        Args:
          config: Content of `adapter_config.json`, whose settings are understood.
          modules: Shapes of the tensors of every adapted kernel (of one layer), by module.

        Raises:
          ValueError: The shapes or the settings fit no method. The caller puts the adapter's name
            before the message.
        """
        raise NotImplementedError(f"{cls.__name__} is written only")

    @classmethod
    def name_in_copy(cls, name: str) -> str:
        """Returns the name of a module's tensor in the copy that PEFT trains."""
        module, _, tensor = name.rpartition(".")
        return f"{module}.{cls.copies}.{tensor}"

    @property
    def scales_bias(self) -> bool:
        """Whether PEFT's layer also scales the base's bias, which a kernel does not have."""
        return False

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the method's settings in `adapter_config.json`."""

    def shared(
        self, shapes: Sequence[tuple[int, int]], constants: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns tensors that all modules share.

        Args:
          shapes: Shapes [d_in, d_out] of all adapted kernels.
          constants: Constant arrays of the same kernels.
        """
        del shapes, constants
        return {}

    def constants(
        self, shared: Mapping[str, np.ndarray], d_in: int, d_out: int
    ) -> dict[str, np.ndarray]:
        """Returns the constant arrays of a kernel [d_in, d_out] that come from shared tensors.

        Args:
          shared: Tensors by `shared_names`.
          d_in: Number of inputs.
          d_out: Number of outputs.
        """
        del shared, d_in, d_out
        return {}

    @abc.abstractmethod
    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns the shapes of the tensors of a kernel [d_in, d_out]."""

    def accepted_shapes(self, d_in: int, d_out: int, found: Shapes) -> Shapes:
        """Returns the shapes that tensors of a kernel must have to be restored.

        Args:
          d_in: Number of inputs.
          d_out: Number of outputs.
          found: Shapes of the stored tensors, by which a form may accept smaller ones.
        """
        del found
        return self.shapes(d_in, d_out)

    def check(self, tensors: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises ValueError if values of tensors, of the right shapes, fit no such kernel.

        The caller puts the module's name before the message: "the adapter of … has …".
        """
        del tensors, d_in, d_out

    @abc.abstractmethod
    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the adapter's arrays, trainable and constant, to PEFT's tensors.

        Raises:
          NoPeftFormError: These values have no PEFT form.
        """

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Converts PEFT's tensors to the adapter's (trainable, constant) arrays.

        Constant arrays that follow from the kernel are left out: see
        `AdapterMethod.kernel_constants`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be restored")


def setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a setting's value, or PEFT's default if it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def plain_number(value: float) -> float | int:
    """Returns a whole number as an integer, as PEFT's files have it."""
    return int(value) if float(value).is_integer() else float(value)


class NoPeftFormError(Exception):
    """Raised for an adapter without a PEFT form; the message says why."""


def nbytes(shapes: Shapes) -> int:
    """Returns the bytes of a module's tensors in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())
