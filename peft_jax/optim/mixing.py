"""Weights the updates of a hybrid adapter's two branches, per layer and step.

A hybrid adapter has a low-rank branch and a rotation branch on one kernel. `hybrid_mixing` wraps
an optimizer and weights the two branches' updates by λ and 1 − λ. It computes λ from the gradients
(Qi, Dai and Huang, "Hybrid and Unitary PEFT for Resource-Efficient Large Language Models", 2025,
arXiv 2507.18076).
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from peft_jax.core import LOW_RANK, ROTATION, Path, is_stacked, join_path, names_of
from peft_jax.core.validation import check_choice, check_fraction

MIXING_RATES: Mapping[str, str] = MappingProxyType(
    {LOW_RANK: "low_rank_rate", ROTATION: "rotation_rate"}
)
"""Fields of `MixingSettings` that hold the branches' rates, by branch."""

RULES = ("proportional", "inverse", "predicted_decrease", "fixed", "none")
BY_NORM = ("proportional", "inverse")
"""Rules that compare norms."""

NORMS = ("frobenius", "rms")
GROUPINGS = ("block", "kernel")

Weight = Float[Array, "layers"] | Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingSettings:
    """Settings that weight the two branches of a hybrid adapter.

    Let e be the score of a branch. The rules are:

    - "predicted_decrease": λ = e_low_rank / (e_low_rank + e_rotation) with e = max(0, −⟨g, Δ⟩), the
      first-order decrease of the loss for the branch's own update Δ, before the branch's rate.
      This score has the units of the loss for both branches. Gradient norms do not, because they
      depend on parametrization: the initialization of LoRA-GA scales A and B, and so their
      gradients' norm. This rule is the default.
    - "proportional": the same ratio with e = ‖g‖, the norm of the branch's gradient. This is the
      paper's rule.
    - "inverse": λ = e_rotation / (e_low_rank + e_rotation) with e = ‖g‖, which favors the branch
      with the smaller gradient.
    - "fixed": λ = `fixed`.
    - "none": both branches take their full update. λ is reported as ½.

    Attributes:
      rule: "predicted_decrease", "proportional", "inverse", "fixed" or "none": how λ follows from
        the branches' gradients.
      norm: "frobenius", or "rms" (Frobenius divided by the root of the number of elements), which
        is independent of the branches' sizes. For "proportional" and "inverse".
      grouping: Kernels that share one λ. "block": all kernels of a transformer block share one, and
        every kernel outside the blocks has its own, and so has one that only some blocks have.
        "kernel": every kernel has its own.
      ema: Decay of a bias-corrected moving average of λ over steps; 0 for none.
      floor: Minimum weight of a branch; λ is clipped to [floor, 1 − floor].
      fixed: λ of the rule "fixed".
      low_rank_rate: Factor on the learning rate of the low-rank branch. It does not affect λ. None
        for the method's own; see `with_rates`.
      rotation_rate: Factor on the learning rate of the rotation branch, likewise.

    Raises:
      ValueError: A name is not known, or a number is outside its range.
    """

    rule: str = "predicted_decrease"
    norm: str = "frobenius"
    grouping: str = "block"
    ema: float = 0.0
    floor: float = 0.0
    fixed: float = 0.5
    low_rank_rate: float | None = None
    rotation_rate: float | None = None

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("norm", self.norm, NORMS)
        check_choice("grouping", self.grouping, GROUPINGS)
        if self.norm != "frobenius" and self.rule not in BY_NORM:
            raise ValueError(
                f"norm is {self.norm!r}, but the rule {self.rule!r} uses no norm; it only applies"
                f" to the rules {' and '.join(BY_NORM)}"
            )
        check_fraction("ema", self.ema)
        if not 0.0 <= self.floor <= 0.5:
            raise ValueError(f"floor must be between 0 and 0.5, but is {self.floor!r}")
        if not 0.0 <= self.fixed <= 1.0:
            raise ValueError(f"fixed must be between 0 and 1, but is {self.fixed!r}")
        for name in ("low_rank_rate", "rotation_rate"):
            rate = getattr(self, name)
            if rate is not None and not (math.isfinite(rate) and rate >= 0.0):
                raise ValueError(f"{name} must be finite and at least 0, but is {rate!r}")

    def rate(self, branch: str) -> float:
        """Returns the factor on the learning rate of a branch; 1 where it is None."""
        rate = getattr(self, MIXING_RATES[branch])
        return 1.0 if rate is None else rate

    def with_rates(self, branches: Mapping[str, float]) -> "MixingSettings":
        """Returns the settings with a method's rates where theirs are None.

        Args:
          branches: Rates by branch, as the attribute `branches` of a method; 1 for one without.

        Example:
          >>> settings = MixingSettings(low_rank_rate=2.0).with_rates({"rotation": 10.0})
          >>> settings.low_rank_rate, settings.rotation_rate
          (2.0, 10.0)
        """
        rates: dict[str, Any] = {
            field: branches.get(branch, 1.0)
            for branch, field in MIXING_RATES.items()
            if getattr(self, field) is None
        }
        return dataclasses.replace(self, **rates)


class MixingState(NamedTuple):
    """State of `hybrid_mixing`.

    Attributes:
      count: Number of steps taken, int32 [].
      weights: λ of the last step by group, float32 [layers] or []; ½ before the first step.
      average: Moving average of λ before bias correction, shaped as `weights`.
      inner_state: State of the wrapped optimizer.
    """

    count: Any
    weights: Any
    average: Any
    inner_state: Any


def hybrid_mixing(
    inner: optax.GradientTransformation, settings: MixingSettings | None = None
) -> optax.GradientTransformationExtraArgs:
    """Weights the updates of a hybrid adapter's two branches, per layer and per step.

    Let g be the gradients of layer l and Δ their updates by `inner`. The weighted updates are

        Δ_low_rank ← λ Δ_low_rank,   Δ_rotation ← (1 − λ) Δ_rotation,
        λ = e_low_rank / (e_low_rank + e_rotation).

    The score e is ‖g‖ in the paper, and max(0, −⟨g, Δ⟩) by default here; see `MixingSettings`.
    Norms are of the gradients *before* `inner`, and λ scales the updates *after* it. A factor on
    the gradients would have no effect with an optimizer that normalizes them, such as Adam.

    A branch is a leaf's path component "low_rank" or "rotation". The components before it name the
    kernel. Other leaves keep the updates of `inner`. Stacked kernels (under the root key "layers")
    have one λ per block. A group with only one branch keeps its full update, times the branch's
    rate. If both scores are zero, or one is not finite, λ is ½.

    The paper defines λ as the ratio of the gradient norms of one layer (rule "proportional"). It
    leaves open what is decided here as follows:

    - Gradients are those of the full accumulated batch, before clipping.
    - A branch's norm is over all its arrays in the group.
    - The moments of the inner optimizer see unweighted gradients.
    - λ scales the full update, including decoupled weight decay.

    The other rules, the moving average, floor, norms, groupings and rates are additions. Only the
    default rule departs from the paper; `MixingSettings(rule="proportional")` is the paper's.

    The order of transformations matters. `inner` must return descent steps, as any complete
    optimizer does, because "predicted_decrease" uses their sign. Gradient accumulation must wrap
    the mixing, `optax.MultiSteps(hybrid_mixing(...), k)`, so that λ uses the accumulated gradient.

    Args:
      inner: Any optimizer. It receives the extra arguments of `update`.
      settings: Mixing settings. Default: the rule "predicted_decrease". A rate that is None is 1;
        `settings.with_rates(spec.method.branches)` has the method's own.

    Returns:
      The wrapped optimizer. Its state is a `MixingState`; read λ with `mixing_weights`.

    Raises:
      ValueError: In `init`: no group has both branches, or stacked leaves of one kernel differ in
        their number of layers. In `update`: the gradients' groups differ from those of `init`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> kernel = {"low_rank": {"a": jnp.ones((2, 3))}, "rotation": {"r": jnp.ones((2, 4))}}
      >>> params = {"layers": {"kernel": kernel}}
      >>> optimizer = hybrid_mixing(optax.sgd(1.0), MixingSettings(rule="proportional"))
      >>> state = optimizer.init(params)
      >>> gradients = {"layers": {"kernel": {
      ...     "low_rank": {"a": jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])},
      ...     "rotation": {"r": jnp.array([[0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])}}}}
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> {name: weight.tolist() for name, weight in mixing_weights(state).items()}
      {'layers': [0.75, 0.0]}
      >>> updates["layers"]["kernel"]["rotation"]["r"][:, 1].tolist()
      [-0.25, -2.0]
    """
    settings = MixingSettings() if settings is None else settings
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> MixingState:
        count = jnp.zeros([], jnp.int32)
        if not isinstance(params, Mapping) and not jax.tree.leaves(params):
            # optax.tree_map_params inspects the state of a placeholder to learn which parts have
            # the parameters' structure. Single leaves tell it that these two do not.
            return MixingState(count, 0.0, 0.0, inner.init(params))
        groups = _find_groups(params, _find_places(params, settings.grouping))
        if not groups:
            raise ValueError(
                "hybrid mixing needs a trainable kernel with both a 'low_rank' and a 'rotation'"
                " branch, but there is none: use the hybrid method, or train without mixing"
            )
        start = settings.fixed if settings.rule == "fixed" else 0.5
        weights = {n: jnp.full(group.shape, start, jnp.float32) for n, group in groups.items()}
        average = {n: jnp.zeros(group.shape, jnp.float32) for n, group in groups.items()}
        return MixingState(count, weights, average, inner.init(params))

    def update(
        updates: Any, state: MixingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MixingState]:
        places = _find_places(updates, settings.grouping)
        groups = _find_groups(updates, places)
        if groups.keys() != state.weights.keys():
            raise ValueError(
                f"the gradients have the mixing groups {sorted(groups)}, but the optimizer was"
                f" initialized with {sorted(state.weights)}; pass gradients of the same tree"
            )
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        correction = 1.0 - jnp.power(jnp.float32(settings.ema), count.astype(jnp.float32))
        average = {
            name: settings.ema * state.average[name] + (1.0 - settings.ema) * weight
            for name, weight in _raw_weights(updates, steps, places, groups, settings).items()
        }
        weights = {
            name: jnp.clip(mean / correction, settings.floor, 1.0 - settings.floor)
            for name, mean in average.items()
        }
        mixed = _apply(steps, weights, places, settings)
        return mixed, MixingState(count, weights, average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def mixing_weights(opt_state: Any) -> dict[str, Weight]:
    """Returns λ of the last step from an optimizer state that contains a `MixingState`.

    Args:
      opt_state: State of any nesting of optax transformations.

    Returns:
      λ by group. Float32 [layers] for "layers" (grouping "block") or for a stacked kernel's dotted
      path (grouping "kernel"); float32 [] for a kernel outside the blocks. Empty without mixing.

    Raises:
      ValueError: Two mixings in one state have a group of the same name.
    """
    found: dict[str, Weight] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MixingState)):
        if not isinstance(node, MixingState):
            continue
        twice = found.keys() & node.weights.keys()
        if twice:
            raise ValueError(
                f"the optimizer state has two mixings of the groups {sorted(twice)}; use"
                " hybrid_mixing once"
            )
        found.update(node.weights)
    return found


@dataclasses.dataclass(frozen=True)
class _Group:
    """A group of leaves that share one λ.

    Attributes:
      shape: Shape of λ: (layers,) for stacked kernels, () for others.
      sizes: Number of elements in one layer, by branch.
    """

    shape: tuple[int, ...]
    sizes: Mapping[str, int]


Places = Mapping[Path, tuple[str, str]]
"""Group and branch by path of a leaf."""


def _find_places(tree: Any, grouping: str) -> Places:
    """Returns the group and branch of each leaf in a branch.

    Raises:
      ValueError: Stacked leaves of one kernel differ in their number of layers.
    """
    leaves = {names_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    positions = {path: at for path in leaves if (at := _branch_position(path)) is not None}
    layers: dict[Path, int] = {}
    for path, position in positions.items():
        if not is_stacked(path):
            continue
        kernel, stack = path[:position], leaves[path].shape[:1]
        if not stack or layers.setdefault(kernel, stack[0]) != stack[0]:
            raise ValueError(
                f"{join_path(path)} has the shape {tuple(leaves[path].shape)}, but the leading axis"
                f" of a stacked leaf must be the number of layers, {layers.get(kernel, 'layers')}"
            )
    # A kernel that only some blocks have is stacked without the others.
    blocks = max(layers.values(), default=0)
    places = {}
    for path, position in positions.items():
        kernel = path[:position]
        by_block = grouping == "block" and layers.get(kernel) == blocks
        places[path] = kernel[0] if by_block else join_path(kernel) or "kernel", path[position]
    return places


def _branch_position(path: Path) -> int | None:
    """Returns the place of the branch among the components of a path; None without one."""
    return next((at for at, name in enumerate(path) if name in (LOW_RANK, ROTATION)), None)


def _find_groups(tree: Any, places: Places) -> dict[str, _Group]:
    """Returns the groups of a tree that have both branches, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = names_of(key_path)
        if path not in places:
            continue
        name, branch = places[path]
        stack = tuple(leaf.shape[:1]) if is_stacked(path) else ()
        shapes[name] = stack
        branches = sizes.setdefault(name, {})
        branches[branch] = branches.get(branch, 0) + math.prod(leaf.shape[len(stack) :])
    return {
        name: _Group(shape=shapes[name], sizes=branches)
        for name, branches in sizes.items()
        if len(branches) == 2
    }


def _sum_per_layer(values: Array, shape: tuple[int, ...]) -> Weight:
    """Returns the float32 sum of a leaf's elements, per layer if it is stacked."""
    axes = tuple(range(len(shape), values.ndim))
    return jnp.sum(values.astype(jnp.float32), axis=axes)


def _scores(
    gradients: Any,
    steps: Any,
    places: Places,
    groups: Mapping[str, _Group],
    settings: MixingSettings,
) -> dict[str, dict[str, Weight]]:
    """Returns the score of each group's branches: gradient norm or predicted decrease."""
    by_step = settings.rule == "predicted_decrease"
    step_at = {names_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(steps)}
    sums: dict[str, dict[str, Weight]] = {
        name: {branch: jnp.zeros(group.shape, jnp.float32) for branch in group.sizes}
        for name, group in groups.items()
    }
    for key_path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        path = names_of(key_path)
        if path not in places or places[path][0] not in groups:
            continue
        name, branch = places[path]
        g = gradient.astype(jnp.float32)
        if by_step:
            if path not in step_at:  # the inner optimizer masks this leaf and takes no step
                continue
            product = -g * step_at[path].astype(jnp.float32)
        else:
            product = jnp.square(g)
        sums[name][branch] = sums[name][branch] + _sum_per_layer(product, groups[name].shape)

    def of_branch(total: Weight, size: int) -> Weight:
        if by_step:
            return jnp.maximum(total, 0.0)
        return jnp.sqrt(total / size) if settings.norm == "rms" else jnp.sqrt(total)

    return {
        name: {
            branch: of_branch(total, groups[name].sizes[branch]) for branch, total in pair.items()
        }
        for name, pair in sums.items()
    }


def _raw_weights(
    gradients: Any,
    steps: Any,
    places: Places,
    groups: Mapping[str, _Group],
    settings: MixingSettings,
) -> dict[str, Weight]:
    """Returns every group's λ by the rule, before the moving average and the floor."""
    if settings.rule in ("fixed", "none"):
        value = settings.fixed if settings.rule == "fixed" else 0.5
        return {name: jnp.full(group.shape, value, jnp.float32) for name, group in groups.items()}
    preferred = ROTATION if settings.rule == "inverse" else LOW_RANK

    def ratio(scores: Mapping[str, Weight]) -> Weight:
        total = scores[LOW_RANK] + scores[ROTATION]
        decided = (total > 0.0) & jnp.isfinite(total)
        return jnp.where(decided, scores[preferred] / jnp.where(decided, total, 1.0), 0.5)

    found = _scores(gradients, steps, places, groups, settings)
    return {name: ratio(scores) for name, scores in found.items()}


def _apply(
    steps: Any, weights: Mapping[str, Weight], places: Places, settings: MixingSettings
) -> Any:
    """Multiplies the inner optimizer's steps by each branch's rate and weight."""

    def scale(key_path: tuple[Any, ...], step: Array) -> Array:
        path = names_of(key_path)
        if path not in places:
            return step
        name, branch = places[path]
        # At least float32, because bfloat16 has only three significant digits.
        dtype = jnp.float64 if step.dtype == jnp.float64 else jnp.float32
        factor = jnp.asarray(settings.rate(branch), dtype)
        if name in weights and settings.rule != "none":
            share = weights[name] if branch == LOW_RANK else 1.0 - weights[name]
            share = share.reshape(share.shape + (1,) * (step.ndim - share.ndim))
            factor = factor * share.astype(dtype)
        return (step.astype(dtype) * factor).astype(step.dtype)

    return jax.tree_util.tree_map_with_path(scale, steps)
