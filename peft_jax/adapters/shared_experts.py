"""Implements one adapter for all experts of a layer, of any method that multiplies by its base."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Int

from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.stacks import one_by_one
from peft_jax.core import SHARED, Kernel, kernel_of_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedByExperts(AdapterMethod):
    """Adapts all experts of a layer by the same arrays: each kernel W_e by one A, B or rotation.

    An adapter of each expert has E times as many parameters, of which a token trains those of its K
    experts. A shared one is trained by every token. Arrays are those of the method for one kernel,
    under the key `SHARED`, without an axis of experts. A gradient to start from is the sum over the
    experts.

    Attributes:
      of: The method. Its `project` multiplies by the base with `linear` alone.
    """

    name: ClassVar[str] = "shared_by_experts"
    learning_rate: ClassVar[float] = 0.0  # that of the method is used
    spans_groups: ClassVar[bool] = True

    of: AdapterMethod

    @property
    def of_one(self) -> AdapterMethod:
        """Returns the method that experts share."""
        return self.of

    @property
    def rank(self) -> int:
        """Returns the rank of the method; 0 if it has none."""
        return getattr(self.of, "rank", 0)

    @property
    def gradient_rank(self) -> int:
        """Returns the number of directions of the summed gradient that the method needs."""
        return self.of.gradient_rank

    def check_layers(self, module: str, methods: Sequence[AdapterMethod | None]) -> None:
        """Raises ValueError if the method cannot differ between layers."""
        self.of.check_layers(module, _methods_of(methods))

    def start_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence[AdapterMethod | None]
    ) -> tuple[Arrays, Arrays]:
        """Returns the method's arrays of layers that differ."""
        found = self.of.start_layers(*_arrays_of(trainable, constant), _methods_of(methods))
        return _shared(*found)

    def hold_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence[AdapterMethod | None]
    ) -> tuple[Arrays, Arrays]:
        """Returns the method's arrays of layers that differ."""
        found = self.of.hold_layers(*_arrays_of(trainable, constant), _methods_of(methods))
        return _shared(*found)

    def neutral(self, shape: tuple[int, int]) -> tuple[Arrays, Arrays]:
        """Returns the method's neutral arrays."""
        return _shared(*self.of.neutral(shape))

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns the method's arrays for one kernel."""
        return _shared(*self.of.init(key, shape, gradient))

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns the method's axes, none of which is sharded: devices hold whole experts."""
        del d_in, d_out
        return _shared(*self.of.axes(None, None))

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the method's prepared arrays."""
        return self.of.prepare(*_arrays_of(trainable, constant), dropout_key=dropout_key)

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns the method's map of one kernel, which may be that of groups."""
        return self.of.project(x, base, arrays, dropout_key=dropout_key)

    def project_groups(
        self,
        x: Float[Array, "rows d_in"],
        base: Kernel,
        arrays: Arrays,
        sizes: Int[Array, " groups"],
    ) -> Float[Array, "rows d_out"]:
        """Returns each row's map, with the kernel of its expert and the shared arrays."""
        return self.project(x, kernel_of_groups(base, sizes), arrays)

    def merge(
        self, base: Float[Array, "experts d_in d_out"], arrays: Arrays
    ) -> Float[Array, "experts d_in d_out"]:
        """Returns the merged kernels of all experts, computed one after the other."""
        return one_by_one(lambda kernel: self.of.merge(kernel, arrays))(base)


def _methods_of(methods: Sequence[AdapterMethod | None]) -> tuple[AdapterMethod | None, ...]:
    """Returns the methods that experts share."""
    return tuple(None if one is None else one.of_one for one in methods)


def _arrays_of(trainable: Arrays, constant: Arrays) -> tuple[Any, Any]:
    """Returns the method's arrays. A method without constant arrays has none in files either."""
    return trainable[SHARED], constant.get(SHARED, {})


def _shared(trainable: Any, constant: Any) -> tuple[Arrays, Arrays]:
    """Returns the arrays or axes under the key of shared ones."""
    return {SHARED: trainable}, {SHARED: constant} if constant else {}
