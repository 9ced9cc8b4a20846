"""Applies a method to a model: initializes, binds and merges its adapters."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import struct
from qwix import QArray

from peft_jax.adapters.gradient_products import LossFn, kernel_shape
from peft_jax.adapters.input_sketch import input_factors
from peft_jax.adapters.method import (
    AdapterMethod,
    ErrorFactors,
    GradientFactors,
    InputFactors,
    StartFactors,
    TrainingMethod,
)
from peft_jax.adapters.quantization_error import Originals, quantization_errors
from peft_jax.adapters.sketch import gradient_factors
from peft_jax.adapters.stacks import one_by_one, over_stack, without_groups
from peft_jax.adapters.target_settings import Targets, TargetSettings
from peft_jax.adapters.targets import find_targets
from peft_jax.adapters.virtual_method import VirtualMethod
from peft_jax.core import (
    VIRTUAL,
    AdaptedKernel,
    GroupedMethod,
    Kernel,
    Path,
    Tree,
    VirtualTokens,
    dense,
    flatten,
    is_experts,
    join_path,
    unflatten,
)
from peft_jax.core.validation import check_choice


@struct.dataclass
class AdapterState:
    """Arrays of an adapter for a whole model, as trees with the model's paths.

    Attributes:
      trainable: At a kernel's path, the method's trainable arrays; at the path of a fully trainable
        leaf, that leaf. Under `VIRTUAL`, the arrays of virtual tokens.
      constant: At a kernel's path, the method's constant arrays, if any.
    """

    trainable: Tree
    constant: Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec(TargetSettings):
    """Specifies a method and where it applies; pure functions over a model's parameters.

    Beside the attributes here it has those of `TargetSettings`, which say where it applies.

    Attributes:
      method: An `AdapterMethod`, a `VirtualMethod`, or one that trains whole leaves, as `Full`.
      dtype: Dtype of trained leaves. Adapters' arrays are made in float32 and cast to it, but for
        integers.

    Example:
      >>> from peft_jax.adapters import LoRA
      >>> params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 3, 4))}}}}
      >>> spec = AdapterSpec(method=LoRA(rank=1))
      >>> state = spec.init(jax.random.key(0), params)
      >>> jax.tree.map(jnp.shape, state.trainable)
      {'layers': {'mlp': {'up_proj': {'kernel': {'a': (2, 3, 1), 'b': (2, 1, 4)}}}}}
      >>> bound = spec.bind(params, state)
      >>> type(bound["layers"]["mlp"]["up_proj"]["kernel"]).__name__
      'AdaptedKernel'
    """

    method: TrainingMethod = dataclasses.field(kw_only=False)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, TrainingMethod):
            raise ValueError(f"method must be a method of fine-tuning, but is {self.method!r}")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))

    def targets(self, params: Tree) -> Targets:
        """Returns the adapted kernels and the fully trainable leaves of a model.

        Args:
          params: The model's parameters, arrays or shapes.

        Raises:
          ValueError: A target matches nothing, a kernel cannot be adapted, or a leaf would be both
            adapted and fully trainable.
        """
        return find_targets(params, self.method, self)

    def init(
        self,
        key: jax.Array,
        params: Tree,
        *,
        loss_fn: LossFn | None = None,
        batches: Sequence[Any] | None = None,
        passes: int = 1,
        factors: Mapping[Path, StartFactors] | None = None,
        originals: Tree | Originals | None = None,
    ) -> AdapterState:
        """Returns the initial arrays, with which the model computes what the base model does.

        Methods with `steps_at_start` compute what the model does after a first step.

        Args:
          key: Random key. A module's arrays depend on the key and the module's name only.
          params: The model's parameters.
          loss_fn: Loss of (parameters, batch), for methods that start from gradients or inputs.
          batches: First batches, for methods that start from gradients or inputs.
          passes: Number of passes over them; see `gradient_factors` and `input_factors`.
          factors: Result of `start_factors`, if known already.
          originals: For methods that correct errors of quantization, the parameters before they
            were quantized, or a function that finds single kernels of them, such as
            `peft_jax.hub.original_kernels(model)`.

        Raises:
          ValueError: As `targets`; or a method needs batches, and no loss or batches are given; or
            it needs `originals`, and none are given or no kernel is quantized.
        """
        if factors is None:
            factors = self.start_factors(
                key, params, loss_fn=loss_fn, batches=batches, passes=passes
            )
        targets = self.targets(params)
        correcting = {p: m for p, m in targets.adapted.items() if m.corrects_quantization}
        if correcting:
            factors = {**factors, **quantization_errors(params, correcting, originals)}
        return self._init(key, params, targets, factors)

    def start_factors(
        self,
        key: jax.Array,
        params: Tree,
        *,
        loss_fn: LossFn | None = None,
        batches: Sequence[Any] | None = None,
        passes: int = 1,
    ) -> dict[Path, StartFactors]:
        """Estimates the gradients or the inputs that adapters start from; empty without a need.

        They depend on what they are of and on the ranks only, so specifications with the same ranks
        on the same kernels may share them. Arguments and errors are those of `init`.
        """
        ranks = self.start_ranks(params)
        if not ranks:
            return {}
        what = "inputs" if self.method.input_rank else "gradient"
        if loss_fn is None or not batches:
            raise ValueError(
                f"{self.method.name} starts from the {what} on the first batches; give"
                " loss_fn and batches"
            )
        sketch_key = jax.random.fold_in(key, zlib.crc32(f"{what} sketch".encode()))
        estimate: Any = input_factors if self.method.input_rank else gradient_factors
        return estimate(loss_fn, params, ranks, batches, sketch_key, passes=passes)

    def start_ranks(self, params: Tree) -> dict[Path, int]:
        """Returns the numbers of directions that adapters start along, by kernel path.

        Args:
          params: The model's parameters, arrays or shapes.
        """
        adapted = self.targets(params).adapted
        return {path: m.start_rank for path, m in adapted.items() if m.start_rank}

    def abstract(self, params: Tree) -> AdapterState:
        """Returns the shapes and dtypes of the arrays of `init`, without batches."""
        targets = self.targets(params)
        factors: dict[Path, StartFactors] = {}
        for path, method in targets.adapted.items():
            if k := method.start_rank:
                *stack, d_in, d_out = _adapter_shape(method, flatten(params)[path])
                of_inputs = ((d_in, k), (k,), ())
                of_gradient = ((d_in, k), (k,), (d_out, k))
                arrays: list[Any] = [
                    jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)
                    for shape in (of_inputs if method.input_rank else of_gradient)
                ]
                kind = InputFactors if method.input_rank else GradientFactors
                factors[path] = kind(*arrays)
        key = jax.eval_shape(lambda: jax.random.key(0))
        flat = flatten(params)
        used = [*targets.trained, *(path for path, m in targets.adapted.items() if m.uses_kernel)]
        if isinstance(self.method, VirtualMethod):
            used += self.method.reads(params)
        return jax.eval_shape(
            lambda key, leaves, factors: self._init(
                key, unflatten(flat | leaves), targets, factors
            ),
            key,
            {path: flat[path] for path in used},
            factors,
        )

    def _init(
        self,
        key: jax.Array,
        params: Tree,
        targets: Targets,
        factors: Mapping[Path, StartFactors],
    ) -> AdapterState:
        flat = flatten(params)
        dtype = jnp.dtype(self.dtype)
        trainable: dict[Path, Any] = {path: flat[path].astype(dtype) for path in targets.trained}
        constant: dict[Path, Any] = {}
        for path, method in targets.adapted.items():
            *stack, d_in, d_out = _adapter_shape(method, flat[path])
            module_key = jax.random.fold_in(key, zlib.crc32(join_path(path).encode()))
            make = _init_function(method, (d_in, d_out))
            kernel = flat[path] if method.uses_kernel else None
            if not stack:
                learned, fixed = make((module_key, factors.get(path), kernel))
            else:
                keys = jax.random.split(module_key, tuple(stack))
                # One kernel at a time where whole kernels are held in float32.
                over = jax.vmap if kernel is None else one_by_one
                make_all = over_stack(over, make, len(stack))
                learned, fixed = make_all((keys, factors.get(path), kernel))
            if path in targets.by_layer:
                learned, fixed = method.start_layers(learned, fixed, targets.by_layer[path])
            trainable[path] = jax.tree.map(lambda a: a.astype(dtype), learned)
            for name, array in flatten(fixed).items():
                whole = jnp.issubdtype(array.dtype, jnp.integer)
                constant[(*path, *name)] = array if whole else array.astype(dtype)
        if isinstance(self.method, VirtualMethod):
            own_key = jax.random.fold_in(key, zlib.crc32(VIRTUAL.encode()))
            for array_name, array in self.method.init(own_key, params).items():
                trainable[(VIRTUAL, array_name)] = array.astype(dtype)
        return AdapterState(trainable=unflatten(trainable), constant=unflatten(constant))

    def frozen(self, params: Tree) -> Tree:
        """Returns the parameters without the fully trainable leaves, so that none is held twice."""
        trained = set(self.targets(params).trained)
        return unflatten({path: v for path, v in flatten(params).items() if path not in trained})

    def bind(
        self,
        params: Tree,
        state: AdapterState,
        *,
        dropout_key: jax.Array | None = None,
        recompute: bool = False,
    ) -> Tree:
        """Returns the parameters with an `AdaptedKernel` at each adapted kernel.

        Args:
          params: The model's parameters, or the result of `frozen`.
          state: The adapter's arrays.
          dropout_key: Random key while training with dropout; None otherwise.
          recompute: Keep only the arrays of `prepare` for the backward pass and recompute their
            inputs, which for a rotation's blocks are several times as large.

        Returns:
          A tree for `model(...)`. Its base arrays are the same objects.

        Raises:
          ValueError: Virtual tokens are bound already, and these are more of them.
        """
        flat = flatten(params)
        if isinstance(self.method, VirtualMethod):
            return unflatten(flat | {(VIRTUAL,): self._virtual_tokens(params, state)})
        learned = _by_leaf(state.trainable, flat)
        for path, own in learned.items():
            if not isinstance(own, Mapping):
                flat[path] = own
        targets = self.targets(unflatten(flat))
        fixed = _by_leaf(state.constant, targets.adapted)
        for path, method in targets.adapted.items():
            key, depth = None, len(_adapter_shape(method, flat[path])) - 2
            # Experts are adapted without dropout only.
            if dropout_key is not None and not is_experts(path):
                key = jax.random.fold_in(dropout_key, zlib.crc32(join_path(path).encode()))
                if depth:
                    key = jax.random.split(key, kernel_shape(flat[path])[0])
            own, constant = learned[path], fixed.get(path, {})
            _check_nested(path, flat[path], method)
            if path in targets.by_layer:
                own, constant = method.hold_layers(own, constant, targets.by_layer[path])
            arrays = _prepare(method, own, constant, key, depth, recompute)
            flat[path] = AdaptedKernel(
                base=flat[path], arrays=arrays, dropout_key=key, method=method
            )
        return unflatten(flat)

    def _virtual_tokens(self, params: Tree, state: AdapterState) -> VirtualTokens:
        """Returns the virtual tokens to bind."""
        assert isinstance(self.method, VirtualMethod)
        self.targets(params)  # checks the settings
        if VIRTUAL in params:
            raise ValueError(
                f"the parameters have virtual tokens already, and {self.method.name} would bind"
                " others; bind one of them"
            )
        return self.method.virtual_tokens(state.trainable[VIRTUAL])

    def merge(self, params: Tree, state: AdapterState) -> Tree:
        """Returns plain parameters that compute what the adapted model does.

        It may be called under `jax.jit`. Values are not known there, so that none is rejected.

        Args:
          params: The model's parameters. Kernels that were adapted before are merged too.
          state: The adapter's arrays.

        Returns:
          A new tree of arrays. Merged kernels have the dtype of the base. A quantized base is
          dequantized to the dtype of its scales, on which the adapter was trained.

        Raises:
          ValueError: A merged kernel or a fully trainable leaf is not finite; the message names the
            module. Or there are virtual tokens, which no kernel can replace.
        """
        self.check_merges(params)
        merged = flatten(self.bind(params, state))
        trained = set(self.targets(unflatten(merged)).trained)
        for path, leaf in merged.items():
            if isinstance(leaf, AdaptedKernel):
                merged[path] = _merge(leaf, len(_adapter_shape(leaf.method, leaf)) - 2)
            elif isinstance(leaf, QArray):
                merged[path] = _dense(leaf)
            elif path not in trained:
                continue
            finite = jnp.isfinite(merged[path]).all()
            if not isinstance(finite, jax.core.Tracer) and not finite:
                raise ValueError(
                    f"{join_path(path[:-1])} merges to values that are not finite; the adapter (or"
                    " the base) holds NaN or infinity there, and nothing was merged"
                )
        return unflatten(merged)

    def check_merges(self, params: Tree) -> None:
        """Raises ValueError if there are virtual tokens, which no kernel can replace."""
        if not self.method.merges or VIRTUAL in params:
            raise ValueError(
                "virtual tokens cannot be merged, because they are inputs and not kernels; bind"
                " them, or export the adapter for PEFT"
            )

    def axes(self, params: Tree, kernel_axes: Tree) -> AdapterState:
        """Returns the logical axes of the adapter's arrays.

        Args:
          params: The model's parameters, arrays or shapes.
          kernel_axes: Logical axes of the parameters, a tuple of names at each leaf.
        """
        targets = self.targets(params)
        flat_axes = flatten(kernel_axes)
        trainable: dict[Path, Any] = {path: flat_axes[path] for path in targets.trained}
        constant: dict[Path, Any] = {}
        for path, method in targets.adapted.items():
            *stack, d_in, d_out = without_groups(method, flat_axes[path])
            learned, fixed = method.axes(d_in, d_out)
            trainable[path] = _prefix_axes(learned, tuple(stack))
            if flatten(fixed):
                constant[path] = _prefix_axes(fixed, tuple(stack))
        if isinstance(self.method, VirtualMethod):
            trainable |= {(VIRTUAL, name): axes for name, axes in self.method.axes().items()}
        return AdapterState(trainable=unflatten(trainable), constant=unflatten(constant))


def merge(params: Tree, spec: AdapterSpec, state: AdapterState) -> Tree:
    """Returns plain parameters that compute what the adapted model does.

    It is `AdapterSpec.merge` as a function.
    """
    return spec.merge(params, state)


def _check_nested(path: Path, kernel: Kernel, method: AdapterMethod) -> None:
    """Raises ValueError if one adapter of experts is shared and another over it is not."""
    if not (is_experts(path) and isinstance(kernel, AdaptedKernel)):
        return
    if cast(GroupedMethod, kernel.method).spans_groups != method.spans_groups:
        raise ValueError(
            f"{join_path(path[:-1])} is adapted twice, once by an adapter that experts share and"
            " once by one of each expert; merge the first one"
        )


def _adapter_shape(method: Any, kernel: Kernel) -> tuple[int, ...]:
    """Returns the axes [..., d_in, d_out] of a kernel that an adapter's arrays have."""
    return without_groups(method, kernel_shape(kernel))


def _init_function(method: AdapterMethod, shape: tuple[int, int]):
    def make(given: tuple[jax.Array, StartFactors | None, Kernel | None]):
        key, factors, kernel = given
        extra: dict[str, Any] = {}
        if kernel is not None:
            # Of an embedding, a method takes the rows that it needs.
            of_table = method.maps_tokens
            extra["kernel"] = kernel if of_table else dense(kernel).astype(jnp.float32)
        if isinstance(factors, InputFactors):
            extra["inputs"] = factors
        elif isinstance(factors, ErrorFactors):
            extra["error"] = factors
        gradient = factors if isinstance(factors, GradientFactors) else None
        return method.init(key, shape, gradient, **extra)

    return make


@functools.partial(jax.jit, static_argnums=(0, 2))
def kernel_constants(method: AdapterMethod, kernel: Kernel, stacked: bool) -> dict[str, jax.Array]:
    """Returns the constant arrays of a method that follow from a kernel, one layer at a time.

    Args:
      method: Method of the kernel.
      kernel: Kernel [d_in, d_out], or stacked [layers, d_in, d_out]; an array or quantized.
      stacked: Whether the kernel is stacked.
    """

    def one(kernel: Kernel) -> dict[str, jax.Array]:
        return method.kernel_constants(dense(kernel).astype(jnp.float32))

    return jax.lax.map(one, kernel) if stacked else one(kernel)


@functools.partial(jax.jit, static_argnums=(0, 4, 5), inline=True)
def _prepare(
    method: AdapterMethod,
    learned: Any,
    fixed: Any,
    key: jax.Array | None,
    depth: int,
    recompute: bool,
):
    """Returns the arrays of `AdapterMethod.prepare`, for all kernels of `depth` leading axes."""

    def prepare(learned: Any, fixed: Any, key: jax.Array | None):
        if key is not None:
            key = jax.random.fold_in(key, 1)  # the key itself drops activations
        return method.prepare(learned, fixed, dropout_key=key)

    prepare_all = over_stack(jax.vmap, prepare, depth)
    return (jax.checkpoint(prepare_all) if recompute else prepare_all)(learned, fixed, key)


@functools.partial(jax.jit, static_argnums=1)
def _merge(kernel: AdaptedKernel, depth: int) -> jax.Array:
    """Returns the merged kernels of `depth` leading axes."""

    def merge(kernel: AdaptedKernel) -> jax.Array:
        nested = isinstance(kernel.base, AdaptedKernel)
        base = merge(kernel.base) if nested else dense(kernel.base)
        return kernel.method.merge(base, kernel.arrays).astype(base.dtype)

    # One at a time, so that one kernel's float32 copy is all that is held beside the result.
    return over_stack(one_by_one, merge, depth)(kernel)


_dense = jax.jit(dense)


def _by_leaf(tree: Tree, paths: Any) -> dict[Path, Any]:
    """Returns the subtrees of `tree` at the given paths, if any."""
    paths = set(paths)
    return flatten(tree, is_leaf=lambda path, _: path in paths)


def _prefix_axes(axes: Any, stack: tuple[str | None, ...]) -> Any:
    return unflatten({path: stack + tuple(names) for path, names in flatten(axes).items()})
