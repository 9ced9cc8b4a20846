"""Builds an optimizer from settings: mixing of (clipping, direction), then the learning rate."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.core import names_of
from peft_jax.core.validation import check_choice, check_finite, check_positive
from peft_jax.optim.clipping import GroupClipping
from peft_jax.optim.components import component_products, component_values
from peft_jax.optim.mixing import LOW_RANK, ROTATION, MixingSettings, hybrid_mixing
from peft_jax.optim.schedules import ScheduleSettings, make_schedule

NO_DECAY = ("bias", "scale", "rotation", "r", "phases", "reflections", "low_rank")
"""Path components without weight decay by default; `OptimizerSettings.no_decay` says why."""


@dataclasses.dataclass(frozen=True)
class _Direction:
    """An optimizer's update direction, before weight decay and learning rate.

    Attributes:
      build: Builds the transformation from the arguments named in `constants`.
      constants: Those of b1, b2 and eps that it takes, with their default values.
      decays: Whether it supports decoupled weight decay.
    """

    build: Callable[..., optax.GradientTransformation]
    constants: Mapping[str, float]
    decays: bool = True


def _adafactor() -> optax.GradientTransformation:
    """Returns `optax.adafactor` without its learning rate and weight decay."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _nadam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam with Nesterov momentum."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=True)


def _rmsprop(b2: float, eps: float) -> optax.GradientTransformation:
    """Returns RMSprop: division by a moving root mean square."""
    return optax.scale_by_rms(decay=b2, eps=eps)


def _sgd(b1: float) -> optax.GradientTransformation:
    """Returns heavy-ball momentum, or the plain gradient if `b1` is zero."""
    return optax.trace(decay=b1) if b1 else optax.identity()


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
_DIRECTIONS = {
    "adamw": _Direction(optax.scale_by_adam, _ADAM),
    "adam": _Direction(optax.scale_by_adam, _ADAM, decays=False),
    "nadamw": _Direction(_nadam, _ADAM),
    "lion": _Direction(optax.scale_by_lion, {"b1": 0.9, "b2": 0.99}),
    "adafactor": _Direction(_adafactor, {}),
    "rmsprop": _Direction(_rmsprop, {"b2": 0.9, "eps": 1e-8}),
    "sgd": _Direction(_sgd, {"b1": 0.0}),
}
OPTIMIZERS = tuple(_DIRECTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer.

    Attributes:
      name: "adamw", "adam", "nadamw", "lion", "adafactor", "rmsprop" or "sgd".
      learning_rate: Peak learning rate of the schedule.
      learning_rates: Peak learning rates of the trainable arrays under a path component, where they
        differ from `learning_rate`. A new head, `{"classifier": 2e-3}`, starts from random weights
        and needs a higher rate than an adapter of a pretrained kernel.
      rate_factors: Factors on the learning rates of the trainable arrays under a path component,
        whether from `learning_rate` or `learning_rates`. The factors of all components of a path
        multiply. `{"b": 16.0}` is LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv 2402.12354), and
        `{"self_attn": 4.0}` trains the attention of a Llama faster than its MLP.
      weight_decay: Decoupled weight decay: each step subtracts learning rate × weight_decay × w
        from a weight w.
      b1: Decay of the first moment; momentum of sgd. None for the optimizer's default.
      b2: Decay of the second moment. None for the optimizer's default.
      eps: Constant added to the denominator. None for the optimizer's default.
      clip_norm: Maximum gradient norm; None for no clipping. Each of a hybrid's branches is clipped
        by its own norm, and so is each component of `learning_rates`, but not of `rate_factors`;
        see `GroupClipping`.
      no_decay: Path components without weight decay, beside the method's own. Decay pulls towards
        zero, so it suits arrays for which zero is harmless: a weight matrix of full fine-tuning, or
        the A and B of plain LoRA. By default it excludes biases and norm scales, as is usual. It
        excludes a rotation's parameters, which are bounded by construction. It excludes BOFT's
        scale, whose neutral value is one. It excludes a hybrid's low-rank branch, because LoRA-GA
        computes AB − A₀B₀: at A = B = 0 it would subtract A₀B₀ from the pretrained kernel.
      schedule: Schedule of the learning rate over the run.

    Raises:
      ValueError: The name is not known, a number is outside its range, or the optimizer does not
        have a given constant.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    clip_norm: float | None = 1.0
    no_decay: tuple[str, ...] = NO_DECAY
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)

    def __post_init__(self) -> None:
        check_choice("name", self.name, OPTIMIZERS)
        check_positive("learning_rate", self.learning_rate)
        for component, rate in self.learning_rates.items():
            check_positive(f"learning_rates[{component!r}]", rate)
        for component, factor in self.rate_factors.items():
            check_positive(f"rate_factors[{component!r}]", factor)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_finite("weight_decay", self.weight_decay)
        direction = _DIRECTIONS[self.name]
        if self.weight_decay and not direction.decays:
            raise ValueError(
                f"weight_decay is {self.weight_decay}, but {self.name} has none; use adamw, or set"
                " weight_decay to 0"
            )
        for constant in ("b1", "b2", "eps"):
            value = getattr(self, constant)
            if value is None:
                continue
            if constant not in direction.constants:
                taken = ", ".join(direction.constants) or "none of b1, b2 and eps"
                raise ValueError(
                    f"{constant} is {value}, but {self.name} does not have it; it takes {taken}"
                )
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{constant} must be at least 0 and below 1, but is {value!r}")

    @property
    def clipping(self) -> GroupClipping | None:
        """Clipping of the gradients; None for none."""
        if self.clip_norm is None:
            return None
        return GroupClipping(self.clip_norm, (LOW_RANK, ROTATION, *self.learning_rates))

    @property
    def constants(self) -> dict[str, float]:
        """Those of b1, b2 and eps that the optimizer takes, each as given or by default."""
        return {
            name: usual if getattr(self, name) is None else getattr(self, name)
            for name, usual in _DIRECTIONS[self.name].constants.items()
        }


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of `make_optimizer` by step (from 0), for logging."""
    return make_schedule(settings.schedule, settings.learning_rate, total_steps)


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, *, mixing: MixingSettings | None = None
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

    Args:
      settings: Settings of the optimizer.
      total_steps: Number of steps of the run, at which the schedule ends.
      mixing: Mixing settings of a hybrid adapter's branches; None for no mixing.

    Returns:
      A transformation for trees such as `AdapterState.trainable`; `update` needs the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> settings = OptimizerSettings(name="sgd", learning_rate=0.5, clip_norm=1.0,
      ...     schedule=ScheduleSettings(name="constant"))
      >>> optimizer = make_optimizer(settings, total_steps=10)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, params)
      >>> [round(x, 3) for x in optax.apply_updates(params, updates)["w"].tolist()]
      [0.7, 1.6]
    """
    inner = [_DIRECTIONS[settings.name].build(**settings.constants)]
    if settings.weight_decay:
        mask = lambda tree: decay_mask(tree, settings.no_decay)  # noqa: E731
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
    return _in_float32(optax.chain(*steps))


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
