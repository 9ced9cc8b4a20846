"""Builds an optimizer from settings: mixing of (clipping, direction), then the learning rate."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.core import LOW_RANK, ROTATION, names_of
from peft_jax.optim.averaging import schedule_free
from peft_jax.optim.components import component_products, component_values
from peft_jax.optim.directions import DIRECTIONS, PRODIGY, SCHEDULE_FREE
from peft_jax.optim.mixing import MixingSettings, hybrid_mixing
from peft_jax.optim.prodigy import prodigy
from peft_jax.optim.schedules import make_schedule
from peft_jax.optim.settings import NO_DECAY, OptimizerSettings


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of `make_optimizer` by step (from 0), for logging."""
    return make_schedule(settings.schedule, settings.learning_rate, total_steps)


def make_optimizer(
    settings: OptimizerSettings,
    total_steps: int,
    *,
    mixing: MixingSettings | None = None,
    branches: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer: mixing of (clipping → direction → weight decay) → learning rate.

    Clipping comes before the direction, so that one bad batch does not enter the moments. The
    mixing is around both, so that λ is computed from the gradients as they are. The learning rate
    comes last, because steps of a zero learning rate would give "predicted_decrease" no
    information.

    State and arithmetic are float32 whatever the dtype of gradients and parameters, because a
    bfloat16 second moment cannot follow a decay of 0.999. The updates are float32 too. Add them
    with `optax.apply_updates`, which casts to the parameters' dtype.

    This differs from optax in two points. Weight decay is always multiplied by the learning rate.
    And the blocks whose root mean squares adafactor uses (leaves) are here full stacks of layers.

    Two optimizers differ from this order. "prodigy" estimates its learning rate from its own steps,
    so the schedule is part of its direction. "schedule_free_adamw" averages the results of all of
    the above; see `schedule_free`.

    Args:
      settings: Settings of the optimizer.
      total_steps: Number of steps of the run, at which the schedule ends.
      mixing: Mixing settings of a hybrid adapter's branches; None for no mixing.
      branches: The method's rates, `spec.method.branches`, for those that `mixing` leaves None.

    Returns:
      A transformation for trees such as `AdapterState.trainable`; `update` needs the parameters.

    Raises:
      ValueError: The optimizer does not support mixing. In `init`: it needs matrices or low-rank
        pairs, and there are none, or a component is in no path.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from peft_jax.optim.schedules import ScheduleSettings
      >>> settings = OptimizerSettings(name="sgd", learning_rate=0.5, clip_norm=1.0,
      ...     schedule=ScheduleSettings(name="constant"))
      >>> optimizer = make_optimizer(settings, total_steps=10)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, params)
      >>> [round(x, 3) for x in optax.apply_updates(params, updates)["w"].tolist()]
      [0.7, 1.6]
    """
    mask = functools.partial(decay_mask, no_decay=settings.no_decay)
    mixing = None if mixing is None else mixing.with_rates(branches)
    if settings.name == PRODIGY:
        return _in_float32(_make_prodigy(settings, total_steps, mask, mixing))
    direction = DIRECTIONS[settings.name]
    steps_too = {"total_steps": total_steps} if direction.over_steps else {}
    inner = [direction.build(**settings.constants, **steps_too)]
    if settings.weight_decay:
        inner.append(optax.add_decayed_weights(settings.weight_decay, mask=mask))
    inner.append(optax.scale(-1.0))
    descent = optax.chain(*inner)
    if settings.clipping is not None:
        descent = settings.clipping.before(descent)
    if mixing is not None:
        descent = hybrid_mixing(descent, mixing)
    steps = [descent, optax.scale_by_schedule(learning_rate_schedule(settings, total_steps))]
    if settings.learning_rates:
        relative = {c: r / settings.learning_rate for c, r in settings.learning_rates.items()}
        by_innermost = functools.partial(component_values, values=relative, default=1.0)
        steps.append(_scale_components("learning_rates", relative, by_innermost))
    if settings.rate_factors:
        products = functools.partial(component_products, factors=settings.rate_factors)
        steps.append(_scale_components("rate_factors", settings.rate_factors, products))
    if settings.clipping is not None:
        # Keeps the structure of the state, and so the checkpoints, of 0.1, where clipping was here.
        steps.insert(0, optax.identity())
    optimizer = optax.chain(*steps)
    if settings.name == SCHEDULE_FREE:
        schedule = learning_rate_schedule(settings, total_steps)
        optimizer = schedule_free(optimizer, schedule, settings.constants["b1"])
    return _in_float32(optimizer)


def _make_prodigy(
    settings: OptimizerSettings,
    total_steps: int,
    mask: Callable[[Any], Any],
    mixing: MixingSettings | None,
) -> optax.GradientTransformation:
    """Returns Prodigy behind clipping; its state is that of Prodigy."""
    if mixing is not None and mixing != dataclasses.replace(
        mixing, rule="none", low_rank_rate=1.0, rotation_rate=1.0
    ):
        raise ValueError(
            f"optimizer.name is 'prodigy', and mixing.rule is {mixing.rule!r} with"
            f" low_rank_rate {mixing.rate(LOW_RANK):g} and rotation_rate {mixing.rate(ROTATION):g},"
            " but prodigy estimates one learning rate for all arrays, so their steps cannot be"
            " weighted: use adamw, or mixing.rule none and both rates 1"
        )
    optimizer = prodigy(
        learning_rate_schedule(settings, total_steps),
        **settings.constants,
        weight_decay=settings.weight_decay,
        decay_mask=mask,
    )
    return optimizer if settings.clipping is None else settings.clipping.before(optimizer)


def decay_mask(tree: Any, no_decay: tuple[str, ...] = NO_DECAY) -> Any:
    """Returns a tree of booleans: whether a leaf decays, having none of the names in its path.

    Example:
      >>> decay_mask({"q": {"kernel": {"a": 0, "b": 0}, "bias": 0}, "norm": {"scale": 0}})
      {'norm': {'scale': False}, 'q': {'bias': False, 'kernel': {'a': True, 'b': True}}}
    """
    return component_values(tree, dict.fromkeys(no_decay, False), True)


def _scale_components(
    setting: str, components: Collection[str], factors_of: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Multiplies updates by factors that depend on the components of their paths.

    Args:
      setting: Name of the setting, for messages.
      components: Path components, each of which must exist.
      factors_of: Returns a tree of factors for a tree of updates.
    """

    def init(params: Any) -> optax.EmptyState:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        known = {component for path in paths for component in names_of(path)}
        unknown = sorted(set(components) - known)
        # optax.tree_map_params initializes with a placeholder, which has no leaves.
        if paths and unknown:
            raise ValueError(
                f"{setting} has {unknown[0]!r}, which is in no trainable array's path; the"
                f" components are {', '.join(sorted(known))}"
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree.map(lambda step, factor: step * factor, updates, factors_of(updates))
        return scaled, state

    return optax.GradientTransformation(init, update)


def _in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation in at least float32, with JAX's standard dtype promotion.

    optax's own arithmetic mixes integers and floats, which JAX rejects under strict promotion.
    """
    inner = optax.with_extra_args_support(inner)

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x if x.dtype == jnp.float64 else x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            wide = None if params is None else widen(params)
            return inner.update(widen(updates), state, wide, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
