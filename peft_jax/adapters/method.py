"""Defines the interface of adapter methods: pure functions over one kernel.

A method is a frozen dataclass of settings. Its functions act on one kernel [d_in, d_out].
`AdapterSpec` maps them over kernels stacked by layer:

    trainable, constant = method.init(key, shape)          # once
    arrays = method.prepare(trainable, constant)           # once per step
    y = method.project(x, base, arrays)                    # on activations
    kernel = method.merge(base, arrays)                    # optionally, after training
"""

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.peft_form import PeftForm
from peft_jax.core import Kernel, Path

Arrays = dict[str, Any]
"""An adapter's arrays on one kernel, by name; nested by branch for the hybrid."""

Axes = dict[str, Any]
"""Logical axis names of `Arrays`, with the same structure."""


class GradientFactors(NamedTuple):
    """Leading singular triplets of a kernel's gradient, G ≈ U diag(S) Vᵀ, in float32.

    Attributes:
      u: Left singular vectors [d_in, k], as orthonormal columns.
      s: Singular values [k], in descending order.
      v: Right singular vectors [d_out, k], as orthonormal columns.
    """

    u: Float[Array, "*stack d_in k"]
    s: Float[Array, "*stack k"]
    v: Float[Array, "*stack d_out k"]


class InputFactors(NamedTuple):
    """Leading principal components of a kernel's inputs, in float32.

    Attributes:
      v: Components [d_in, k], as orthonormal columns.
      variance: Variances of the inputs along them [k], in descending order.
      total: Total variance of the inputs, the trace of their covariance.
    """

    v: Float[Array, "*stack d_in k"]
    variance: Float[Array, "*stack k"]
    total: Float[Array, "*stack"]


class ErrorFactors(NamedTuple):
    """Leading singular triplets of a quantized kernel's error, W - Q ≈ U diag(S) Vᵀ, in float32.

    Attributes:
      u: Left singular vectors [d_in, k], as orthonormal columns.
      s: Singular values [k], in descending order.
      v: Right singular vectors [d_out, k], as orthonormal columns.
    """

    u: Float[Array, "*stack d_in k"]
    s: Float[Array, "*stack k"]
    v: Float[Array, "*stack d_out k"]


StartFactors = GradientFactors | InputFactors | ErrorFactors
"""Factors of gradients or of inputs, estimated on the first batches, or of errors of quantization,
to initialize an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """Base class of fine-tuning methods: an `AdapterMethod`, or `Full`.

    Code outside of `peft_jax.adapters` uses these properties instead of testing for a method.
    """

    name: ClassVar[str]
    """Name of the method in configurations."""
    learning_rate: ClassVar[float]
    """Default learning rate; the best one depends on the model and the task."""
    branches: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Factors on the learning rates of branches whose updates are mixed, by key in the adapter's
    trees; empty without mixing."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Names of arrays without weight decay, because zero is not their neutral value."""
    trains_base: ClassVar[bool] = False
    """Whether the base model's own leaves are trained, so that the result is a full model."""
    merges: ClassVar[bool] = True
    """Whether the result can be merged into the base model's leaves."""
    corrects_quantization: ClassVar[bool] = False
    """Whether `init` is given, for a quantized kernel, the result of `error_factors` as a keyword
    argument `error`. The adapter then belongs to kernels of the same format."""

    @property
    def gradient_rank(self) -> int:
        """Number of singular directions of the gradient that `init` needs; 0 for none."""
        return 0

    @property
    def input_rank(self) -> int:
        """Number of principal components of the inputs that `init` needs; 0 for none.

        It is then given `InputFactors`, as a keyword argument `inputs`.
        """
        return 0

    @property
    def start_rank(self) -> int:
        """Number of directions, of the gradient or of the inputs, that `init` needs."""
        return self.gradient_rank or self.input_rank

    def trains_module(self, leaves: Sequence[Path]) -> bool:
        """Returns whether a method that trains whole leaves may train those of a module."""
        del leaves
        return True

    def peft_form(self) -> PeftForm | None:
        """Returns Hugging Face PEFT's form of the arrays; None if PEFT has no such method.

        It is the first of the class's own `peft_forms`. A subclass may compute something else, so
        that it inherits none.
        """
        forms = type(self).peft_forms() if "peft_forms" in vars(type(self)) else ()
        return forms[0](self) if forms else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the forms in which adapters of Hugging Face PEFT are loaded as this method."""
        return ()

    @property
    def has_dropout(self) -> bool:
        """Whether the method uses dropout while training."""
        names = (field.name for field in dataclasses.fields(self))
        return any(getattr(self, name) > 0 for name in names if name.endswith("dropout"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterMethod(TrainingMethod, abc.ABC):
    """Base class of methods that adapt a kernel."""

    uses_kernel: ClassVar[bool] = False
    """Whether `init` is given the kernel itself, as a keyword argument `kernel` [d_in, d_out] in
    float32, as a start from its singular vectors or its norms needs it."""

    steps_at_start: ClassVar[bool] = False
    """Whether the initial adapter changes the function: by one step along the gradient, or towards
    that of the kernels before they were quantized."""

    maps_tokens: ClassVar[bool] = False
    """Whether the method adapts embeddings [vocab, embed], not linear maps. It then implements
    `peft_jax.core.kernel.TableMethod`, and `init` is given the embedding as `kernel`."""

    spans_groups: ClassVar[bool] = False
    """True if all kernels of a group, such as the experts of a layer, share one set of arrays."""

    maps_input: ClassVar[bool] = False
    """Whether `project` maps the input before it multiplies by the base kernel. The gradient of the
    input is then mapped back, which on a mesh should come before its sum over devices: see
    `peft_jax.parallel.column_products`, which needs `prepared_axes`."""

    @property
    def of_one(self) -> "AdapterMethod":
        """Returns the method itself; `SharedByExperts` returns the method that it shares."""
        return self

    def for_module(self, module: str, *, rank: int | None, alpha: float | None) -> "AdapterMethod":
        """Returns the method for one module, with that module's rank and alpha.

        Args:
          module: Dotted name of the module, without a layer number.
          rank: Rank for this module; None keeps the method's.
          alpha: Alpha for this module; None keeps the method's.

        Raises:
          ValueError: The method has no rank or alpha to replace.
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
        """Raises ValueError if the settings name a module that is not adapted."""

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError, naming `module`, if a kernel [d_in, d_out] cannot be adapted."""

    def check_experts(self, module: str) -> None:
        """Raises ValueError, naming `module`, if kernels of experts cannot be adapted.

        A method that can adapt them has `project_groups`, see `GroupedMethod`.
        """
        raise ValueError(
            f"{module} belongs to experts, of which {self.name} cannot adapt each; lora, lora_fa,"
            " pissa, olora, loftq, loha, gralora and adalora can. Set share_experts for one adapter"
            ' of all experts, or leave them out, as target_modules="all-linear" does'
        )

    def check_shared_experts(self, module: str) -> None:
        """Raises ValueError, naming `module`, if experts cannot share one adapter.

        It can be shared unless it depends on the entries of kernels, or on inputs that count.
        """
        if self.uses_kernel or self.input_rank or self.corrects_quantization:
            what = "inputs" if self.input_rank else "kernel"
            raise ValueError(
                f"{module} belongs to experts, which cannot share an adapter of {self.name},"
                f" because it depends on the {what} of each; unset share_experts, leave experts"
                " out, or use another method, such as lora"
            )
        if self.has_dropout:
            raise ValueError(
                f"{self.name} has dropout, but must have none for experts such as {module}; set it"
                " to 0, or leave experts out"
            )

    def check_layers(self, module: str, methods: Sequence["AdapterMethod | None"]) -> None:
        """Raises ValueError, naming `module`, if layers cannot have these methods.

        Args:
          module: Dotted name of the module.
          methods: Method of each layer, or None where it is not adapted. This method is the widest.
        """
        if other := next((one for one in methods if one is not None and one != self), None):
            raise ValueError(
                f"{self.name} has the same settings in all layers, but {module} has {self} and"
                f" {other}; give rank_pattern and alpha_pattern without layer numbers"
            )
        if self.uses_kernel:
            raise ValueError(
                f"{self.name} starts from the kernels and adapts all layers, but {module} is"
                " adapted in some only; name modules without layer numbers"
            )

    def start_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence["AdapterMethod | None"]
    ) -> tuple[Arrays, Arrays]:
        """Returns the initial arrays [layers, ...] of layers that differ; see `check_layers`."""
        del methods
        return trainable, constant

    def hold_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence["AdapterMethod | None"]
    ) -> tuple[Arrays, Arrays]:
        """Returns the arrays [layers, ...] for `prepare` of layers that differ.

        Layers that are not adapted get no gradient, so that they keep their initial arrays, with
        which they compute what the base does.
        """
        adapted = np.array([one is not None for one in methods])

        def hold(array: jax.Array) -> jax.Array:
            mask = adapted.reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(mask, array, jax.lax.stop_gradient(array))

        return jax.tree.map(hold, trainable), constant

    def error_factors(self, error: Float[Array, "d_in d_out"]) -> ErrorFactors:
        """Returns the factors of a kernel's error W - Q that `init` needs.

        It is called for methods with `corrects_quantization`, which define it.

        Args:
          error: Error in float32 [d_in, d_out].

        Raises:
          NotImplementedError: The method has the flag and does not define it.
        """
        raise NotImplementedError(f"{self.name} does not correct quantization")

    def neutral(self, shape: tuple[int, int]) -> tuple[Arrays, Arrays]:
        """Returns arrays with which an adapted kernel computes what the base kernel does.

        Args:
          shape: Kernel shape (d_in, d_out).
        """
        return self.init(jax.random.key(0), shape)

    @abc.abstractmethod
    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns the initial arrays for one kernel: (trainable, constant), float32.

        Constants may be integers, such as places in the kernel.

        With them, the adapted kernel computes what the base kernel does, up to rounding, unless
        `steps_at_start` says otherwise.

        Args:
          key: Random key.
          shape: Kernel shape (d_in, d_out).
          gradient: Factors of the kernel's gradient; required if `gradient_rank` is above 0.
        """

    def kernel_constants(self, kernel: Float[Array, "d_in d_out"]) -> Arrays:
        """Returns the constant arrays that follow from the kernel [d_in, d_out] in float32.

        Files of Hugging Face PEFT lack them, so that they are computed when such a file is loaded.
        """
        del kernel
        return {}

    @abc.abstractmethod
    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns the logical axes of the arrays of `init`, given those of the kernel."""

    @abc.abstractmethod
    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the arrays for `project` and `merge`; called once per step before the layers."""

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the logical axes of the arrays of `prepare`; None if they are not known."""
        del d_in, d_out
        return None

    def local_axes(self, d_in: str, d_out: str) -> Axes | None:
        """Returns the axes of `prepared_axes` if `project` maps its input; see `ShardedMethod`."""
        return self.prepared_axes(d_in, d_out) if self.maps_input else None

    @abc.abstractmethod
    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns the adapted linear map of activations.

        It makes no array of the kernel's size, unless its inputs and outputs are larger.
        """

    @abc.abstractmethod
    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns one float32 kernel that is equivalent to `project`."""

    def low_rank_factors(
        self, arrays: Arrays
    ) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]] | None:
        """Returns A and B if `project` computes x W + (x A) B; None for other methods.

        Args:
          arrays: Result of `prepare`.
        """
        del arrays
        return None


def drop_inputs(
    x: Float[Array, "*batch d_in"], rate: float, key: jax.Array | None
) -> Float[Array, "*batch d_in"]:
    """Returns inputs of which some are zero, and the others larger by 1 / (1 - rate).

    Args:
      x: Inputs of a kernel.
      rate: Probability that an input is dropped.
      key: Random key; None outside of training, which drops nothing.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
