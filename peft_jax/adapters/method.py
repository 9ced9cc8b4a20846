"""What every adapter method provides: pure functions over one kernel.

A method is a frozen dataclass of settings. Its functions speak of one kernel [d_in, d_out];
`AdapterSpec` maps them over kernels stacked by layer. The life of an adapter on one kernel:

    trainable, constant = method.init(key, shape)          # once
    arrays = method.prepare(trainable, constant)           # once a step: what it multiplies by
    y = method.project(x, base, arrays)                    # on activations
    kernel = method.merge(base, arrays)                    # at the end, if wanted
"""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float

from peft_jax.core import Kernel

Arrays = dict[str, Any]
"""An adapter's arrays over one kernel: names to arrays, nested by branch for the hybrid."""

Axes = dict[str, Any]
"""The logical axis names of `Arrays`, leaf by leaf."""


class GradientFactors(NamedTuple):
    """The leading singular triplets of a kernel's gradient, G ≈ U diag(S) Vᵀ.

    Attributes:
      u: left vectors [d_in, k], orthonormal columns, float32.
      s: singular values [k], falling.
      v: right vectors [d_out, k], orthonormal columns.
    """

    u: Float[Array, "*stack d_in k"]
    s: Float[Array, "*stack k"]
    v: Float[Array, "*stack d_out k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """What a method of fine-tuning says of itself: an `AdapterMethod`, or `Full`.

    Nothing outside of `peft_jax.adapters` asks which method it has; it asks these.
    """

    name: ClassVar[str]
    """What the method is called in configurations."""
    learning_rate: ClassVar[float]
    """The learning rate to begin with; the best one depends on the model and the task."""
    branches: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """The branches whose updates are mixed, by their key in the adapter's trees, and the factor on
    each one's learning rate; empty where there is nothing to mix."""
    trains_base: ClassVar[bool] = False
    """Whether the base's own leaves are trained, so that the result is a whole model."""

    @property
    def gradient_rank(self) -> int:
        """Number of singular directions of the gradient that `init` needs; 0 for none."""
        return 0

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped while training."""
        names = (field.name for field in dataclasses.fields(self))
        return any(getattr(self, name) > 0 for name in names if name.endswith("dropout"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterMethod(TrainingMethod, abc.ABC):
    """One way of adapting a kernel."""

    def for_module(self, module: str, *, rank: int | None, alpha: float | None) -> "AdapterMethod":
        """This method as it applies to one module, given that module's own rank and alpha.

        Args:
          module: the module's dotted name, without a layer number.
          rank: replaces the method's, unless None.
          alpha: replaces the method's, unless None.

        Raises:
          ValueError: when the method has no rank or alpha to replace.
        """
        del module
        changes = {k: v for k, v in (("rank", rank), ("alpha", alpha)) if v is not None}
        known = {field.name for field in dataclasses.fields(self)}
        for unknown in sorted(set(changes) - known):
            raise ValueError(
                f"{unknown}_pattern is given, but the method {self.name!r} has no {unknown}"
            )
        return dataclasses.replace(self, **changes) if changes else self

    def check_modules(self, modules: Collection[str]) -> None:
        """Raises ValueError when the settings speak of a module that is not among the adapted."""

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError, naming `module`, when a kernel [d_in, d_out] cannot be adapted."""

    @abc.abstractmethod
    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """The adapter's first arrays over a kernel: (trained, constant), float32.

        At these the adapted kernel computes what the kernel alone does, to float error.

        Args:
          key: a random key.
          shape: (d_in, d_out).
          gradient: the kernel's gradient's factors where `gradient_rank` is above 0.
        """

    @abc.abstractmethod
    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """The logical axes of what `init` returns, given those of the kernel."""

    @abc.abstractmethod
    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """What `project` and `merge` multiply by; computed once a step, before the layers run."""

    @abc.abstractmethod
    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """The adapted linear map of the activations; nothing of size d_in x d_out is built."""

    @abc.abstractmethod
    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """The one kernel that computes what `project` computes, in float32."""
