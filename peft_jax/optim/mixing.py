"""Hybrid mixing: how much of each branch's update a layer takes, decided anew at every step.

A hybrid adapter has a low-rank branch and a rotation branch on one kernel. `hybrid_mixing` wraps
an optimizer and weighs the two branches' updates by λ and 1 − λ, where λ is read off the gradients
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

from peft_jax.core import Path, is_stacked, join_path
from peft_jax.core.validation import check_choice, check_fraction

LOW_RANK = "low_rank"
"""The path component under which a hybrid adapter keeps its low-rank branch."""

ROTATION = "rotation"
"""The path component under which a hybrid adapter keeps its rotation branch."""

MIXING_RATES: Mapping[str, str] = MappingProxyType(
    {LOW_RANK: "low_rank_rate", ROTATION: "rotation_rate"}
)
"""The field of `MixingSettings` that holds a branch's rate, by branch."""

RULES = ("proportional", "inverse", "predicted_decrease", "fixed", "none")
BY_NORM = ("proportional", "inverse")
"""The rules that compare norms."""

NORMS = ("frobenius", "rms")
GROUPINGS = ("block", "kernel")

Weight = Float[Array, "layers"] | Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingSettings:
    """How the two branches of a hybrid adapter are weighed against each other.

    With e the evidence of a branch, the rules are

    - "predicted_decrease": λ = e_low_rank / (e_low_rank + e_rotation) with e = max(0, −⟨g, Δ⟩), the
      first-order decrease of the loss that the branch's own update Δ promises. It is in the units
      of the loss for both branches, which gradient norms of differently parametrised branches are
      not: LoRA-GA's start scales A and B, and the norm of their gradient with it. The default, from
      the study in docs/study;
    - "proportional": the same with e = ‖g‖, the norm of the branch's gradient: the paper's rule;
    - "inverse": with norms, λ = e_rotation / (e_low_rank + e_rotation), which evens the branches;
    - "fixed": λ = `fixed`;
    - "none": both branches take their whole update. λ reads as ½, since neither is preferred.

    Attributes:
      rule: one of the above.
      norm: "frobenius", or "rms" (divided by the root of the number of elements), with which the
        sizes of the branches do not decide; for "proportional" and "inverse".
      grouping: what shares one λ. "block": all kernels of a transformer block together, and every
        kernel outside the blocks by itself; "kernel": every kernel by itself.
      ema: decay of a bias-corrected moving average over the steps' λ; 0 for none.
      floor: the least weight a branch can get; λ is clipped to [floor, 1 − floor].
      fixed: λ under the rule "fixed".
      low_rank_rate: a factor on the learning rate of the low-rank branch.
      rotation_rate: a factor on the learning rate of the rotation branch.

    Raises:
      ValueError: a name is not known, or a number is outside its range.
    """

    rule: str = "predicted_decrease"
    norm: str = "frobenius"
    grouping: str = "block"
    ema: float = 0.0
    floor: float = 0.0
    fixed: float = 0.5
    low_rank_rate: float = 1.0
    rotation_rate: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("norm", self.norm, NORMS)
        check_choice("grouping", self.grouping, GROUPINGS)
        if self.norm != "frobenius" and self.rule not in BY_NORM:
            raise ValueError(
                f"norm is {self.norm!r}, but the rule {self.rule!r} looks at no norm; it is for the"
                f" rules {' and '.join(BY_NORM)}"
            )
        check_fraction("ema", self.ema)
        if not 0.0 <= self.floor <= 0.5:
            raise ValueError(f"floor must be between 0 and 0.5, but is {self.floor!r}")
        if not 0.0 <= self.fixed <= 1.0:
            raise ValueError(f"fixed must be between 0 and 1, but is {self.fixed!r}")
        for name in ("low_rank_rate", "rotation_rate"):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate >= 0.0):
                raise ValueError(f"{name} must be finite and at least 0, but is {rate!r}")

    def rate(self, branch: str) -> float:
        """The factor on the learning rate of a branch."""
        return getattr(self, MIXING_RATES[branch])


class MixingState(NamedTuple):
    """The state of `hybrid_mixing`.

    Attributes:
      count: steps taken, int32 [].
      weights: λ of the last step by group, float32 [layers] or []; ½ before the first step.
      average: the moving average of λ, not yet corrected for its start at zero; as `weights`.
      inner_state: the state of the wrapped optimizer.
    """

    count: Any
    weights: Any
    average: Any
    inner_state: Any


def hybrid_mixing(
    inner: optax.GradientTransformation, settings: MixingSettings | None = None
) -> optax.GradientTransformationExtraArgs:
    """Weighs the updates of a hybrid adapter's two branches, per layer and per step.

    With g_l the gradients of layer l that come in and Δ_l what `inner` makes of them,

        Δ_l of the low-rank branch ← λ_l Δ_l,   Δ_l of the rotation branch ← (1 − λ_l) Δ_l,
        λ_l = e_l of the low-rank branch / (e_l of the low-rank branch + e_l of the rotation),

    where e_l = ‖g_l‖ in the paper, and by default here e_l = max(0, −⟨g_l, Δ_l⟩); `MixingSettings`
    has the rules. Norms are of the gradients *before* `inner`, and λ is applied to the updates
    *after* it: an optimizer that normalizes, as Adam does, would divide a factor on the gradients
    out again.

    A branch is recognized by the path component "low_rank" or "rotation"; the kernel it belongs to
    is what stands before that component. Leaves outside a branch pass through as `inner` left them.
    Stacked kernels (under the root key "layers") have a λ for every block. A group in which one
    branch alone is present has nothing to be mixed with: it keeps its whole update, times its rate.
    When both branches' evidence is zero, or either is not finite, λ is ½.

    The paper gives λ as the ratio of gradient norms of one layer, the rule "proportional". What it
    leaves to the implementation is settled here so: the gradients are the raw ones of the whole
    (accumulated) batch; the norm of a branch is that of all its arrays in the group together; the
    moments of the inner optimizer see the unmixed gradients; and λ scales the whole update,
    decoupled weight decay included. The other rules, moving average, floor, norms, groupings and
    the rates of the branches are additions; of these the rule alone departs from the paper by
    default, and `MixingSettings(rule="proportional")` is the paper's.

    Two orders matter. `inner` must return steps *down* the gradient (what `optax.apply_updates`
    adds), as any complete optimizer does: "predicted_decrease" reads their sign. And accumulation
    goes around the mixing, `optax.MultiSteps(hybrid_mixing(...), k)`, so that λ is that of the
    accumulated gradient.

    Args:
      inner: any optimizer; extra arguments of `update` are handed to it.
      settings: rule, norm, grouping and the rest; by predicted decrease by default.

    Returns:
      The wrapped optimizer. Its state is a `MixingState`; read λ with `mixing_weights`.

    Raises:
      ValueError: (by `init`) no group has both branches, or a stacked leaf does not have the same
        number of layers as the others; (by `update`) the gradients' groups are not those of `init`.

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
            # optax.tree_map_params looks at the state of a placeholder to learn which parts follow
            # the parameters. Single leaves tell it that these two do not, however many groups.
            return MixingState(count, 0.0, 0.0, inner.init(params))
        groups = _find_groups(params, settings.grouping)
        if not groups:
            raise ValueError(
                "hybrid mixing found no kernel with both a 'low_rank' and a 'rotation' branch in "
                "what is trained; use it with the hybrid method, or take the mixing out"
            )
        start = settings.fixed if settings.rule == "fixed" else 0.5
        weights = {n: jnp.full(group.shape, start, jnp.float32) for n, group in groups.items()}
        average = {n: jnp.zeros(group.shape, jnp.float32) for n, group in groups.items()}
        return MixingState(count, weights, average, inner.init(params))

    def update(
        updates: Any, state: MixingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MixingState]:
        groups = _find_groups(updates, settings.grouping)
        if groups.keys() != state.weights.keys():
            raise ValueError(
                f"the gradients have the mixing groups {sorted(groups)}, and the optimizer was "
                f"initialized with {sorted(state.weights)}; give it the same tree"
            )
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        correction = 1.0 - jnp.power(jnp.float32(settings.ema), count.astype(jnp.float32))
        average = {
            name: settings.ema * state.average[name] + (1.0 - settings.ema) * weight
            for name, weight in _raw_weights(updates, steps, groups, settings).items()
        }
        weights = {
            name: jnp.clip(mean / correction, settings.floor, 1.0 - settings.floor)
            for name, mean in average.items()
        }
        mixed = _apply(steps, weights, settings)
        return mixed, MixingState(count, weights, average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def mixing_weights(opt_state: Any) -> dict[str, Weight]:
    """λ of the last step, wherever in an optax state `hybrid_mixing` keeps it.

    Args:
      opt_state: the state of any nest of optax transformations.

    Returns:
      λ by group: float32 [layers] for "layers" (grouping "block") or for a stacked kernel's dotted
      path (grouping "kernel"), [] for a kernel outside the blocks. Empty where nothing is mixed.

    Raises:
      ValueError: two mixings in one state have a group of the same name.
    """
    found: dict[str, Weight] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MixingState)):
        if not isinstance(node, MixingState):
            continue
        twice = found.keys() & node.weights.keys()
        if twice:
            raise ValueError(f"the groups {sorted(twice)} are mixed twice in one optimizer state")
        found.update(node.weights)
    return found


@dataclasses.dataclass(frozen=True)
class _Group:
    """The leaves that share one λ.

    Attributes:
      shape: of λ: (layers,) for stacked kernels, () for others.
      sizes: how many elements each branch has in one layer.
    """

    shape: tuple[int, ...]
    sizes: Mapping[str, int]


def _names(key_path: tuple[Any, ...]) -> Path:
    """JAX's key path as plain names, whatever kind of node each key belongs to."""
    return tuple(
        str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))
        for key in key_path
    )


def _locate(path: Path, grouping: str) -> tuple[str, str] | None:
    """The group and branch of a leaf, or None outside any branch."""
    for position, component in enumerate(path):
        if component in (LOW_RANK, ROTATION):
            kernel = path[:position]
            by_block = grouping == "block" and kernel and is_stacked(kernel)
            return (kernel[0] if by_block else join_path(kernel) or "kernel"), component
    return None


def _find_groups(tree: Any, grouping: str) -> dict[str, _Group]:
    """The groups of a tree that have both branches, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = _names(key_path)
        located = _locate(path, grouping)
        if located is None:
            continue
        name, branch = located
        stack = tuple(leaf.shape[:1]) if is_stacked(path) else ()
        if (is_stacked(path) and not stack) or shapes.setdefault(name, stack) != stack:
            raise ValueError(
                f"{join_path(path)} has the shape {tuple(leaf.shape)}; a leaf of the stacked "
                f"blocks must begin with the number of layers, {shapes.get(name, ('layers',))[0]}"
            )
        branches = sizes.setdefault(name, {})
        branches[branch] = branches.get(branch, 0) + math.prod(leaf.shape[len(stack) :])
    return {
        name: _Group(shape=shapes[name], sizes=branches)
        for name, branches in sizes.items()
        if len(branches) == 2
    }


def _sum_per_layer(values: Array, shape: tuple[int, ...]) -> Weight:
    """The sum of a leaf's elements, by layer where it is stacked; in float32."""
    axes = tuple(range(len(shape), values.ndim))
    return jnp.sum(values.astype(jnp.float32), axis=axes)


def _evidence(
    gradients: Any, steps: Any, groups: Mapping[str, _Group], settings: MixingSettings
) -> dict[str, dict[str, Weight]]:
    """What speaks for each branch of each group: its gradient's norm, or its predicted decrease."""
    by_step = settings.rule == "predicted_decrease"
    step_at = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(steps)}
    sums: dict[str, dict[str, Weight]] = {
        name: {branch: jnp.zeros(group.shape, jnp.float32) for branch in group.sizes}
        for name, group in groups.items()
    }
    for key_path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        path = _names(key_path)
        located = _locate(path, settings.grouping)
        if located is None or located[0] not in groups:
            continue
        name, branch = located
        g = gradient.astype(jnp.float32)
        if by_step:
            if path not in step_at:  # masked out by the inner optimizer: it takes no step
                continue
            product = -settings.rate(branch) * g * step_at[path].astype(jnp.float32)
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
    gradients: Any, steps: Any, groups: Mapping[str, _Group], settings: MixingSettings
) -> dict[str, Weight]:
    """λ of every group by the rule, before average and floor."""
    if settings.rule in ("fixed", "none"):
        value = settings.fixed if settings.rule == "fixed" else 0.5
        return {name: jnp.full(group.shape, value, jnp.float32) for name, group in groups.items()}
    preferred = ROTATION if settings.rule == "inverse" else LOW_RANK

    def ratio(evidence: Mapping[str, Weight]) -> Weight:
        total = evidence[LOW_RANK] + evidence[ROTATION]
        decided = (total > 0.0) & jnp.isfinite(total)
        return jnp.where(decided, evidence[preferred] / jnp.where(decided, total, 1.0), 0.5)

    found = _evidence(gradients, steps, groups, settings)
    return {name: ratio(evidence) for name, evidence in found.items()}


def _apply(steps: Any, weights: Mapping[str, Weight], settings: MixingSettings) -> Any:
    """The inner optimizer's steps, each branch times its rate and its share."""

    def scale(key_path: tuple[Any, ...], step: Array) -> Array:
        located = _locate(_names(key_path), settings.grouping)
        if located is None:
            return step
        name, branch = located
        # In float32 at least: bfloat16 has three significant digits for λ.
        dtype = jnp.float64 if step.dtype == jnp.float64 else jnp.float32
        factor = jnp.asarray(settings.rate(branch), dtype)
        if name in weights and settings.rule != "none":
            share = weights[name] if branch == LOW_RANK else 1.0 - weights[name]
            share = share.reshape(share.shape + (1,) * (step.ndim - share.ndim))
            factor = factor * share.astype(dtype)
        return (step.astype(dtype) * factor).astype(step.dtype)

    return jax.tree_util.tree_map_with_path(scale, steps)
