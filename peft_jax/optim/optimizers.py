"""One optimizer from settings: clipping, then a direction, then the mixing, then the rate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.validation import check_choice, check_finite, check_positive
from peft_jax.optim.mixing import MixingSettings, hybrid_mixing
from peft_jax.optim.schedules import ScheduleSettings, make_schedule

NO_DECAY = ("bias", "scale", "rotation", "r", "phases", "reflections", "low_rank")
"""Path components under which nothing decays by default; `OptimizerSettings.no_decay` says why."""


@dataclasses.dataclass(frozen=True)
class _Direction:
    """One optimizer's way from gradients to directions, before decay and learning rate.

    Attributes:
      build: from the constants named in `constants` to the transformation.
      constants: which of b1, b2 and eps it takes, and the values that are usual for it.
      decays: whether decoupled weight decay belongs to it.
    """

    build: Callable[..., optax.GradientTransformation]
    constants: Mapping[str, float]
    decays: bool = True


def _adafactor() -> optax.GradientTransformation:
    """As `optax.adafactor`, without its learning rate and its decay."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _nadam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with Nesterov's momentum."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=True)


def _rmsprop(b2: float, eps: float) -> optax.GradientTransformation:
    """Division by a moving root mean square."""
    return optax.scale_by_rms(decay=b2, eps=eps)


def _sgd(b1: float) -> optax.GradientTransformation:
    """Heavy-ball momentum, or the bare gradient where it is zero."""
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
    """Which optimizer, and how fast.

    Attributes:
      name: "adamw", "adam", "nadamw", "lion", "adafactor", "rmsprop" or "sgd".
      learning_rate: the peak of the schedule.
      learning_rates: peaks that differ from it, by path component: all that is trained under one.
        A new head, `{"classifier": 2e-3}`, starts from nothing, and wants longer steps than what
        adapts a pretrained kernel.
      weight_decay: λ of decoupled decay: a step subtracts (its learning rate) λ w from a weight w.
      b1: decay of the first moment, of sgd the momentum; None for what is usual for the optimizer.
      b2: decay of the second moment; None for what is usual.
      eps: what is added to a root before it divides; None for what is usual.
      clip_norm: gradients whose norm over all leaves exceeds it are scaled down to it; None for no
        clipping.
      no_decay: nothing decays under these path components. Decay pulls towards zero, so it belongs
        where zero is a harmless place: a weight matrix of full fine-tuning, or plain LoRA's A and
        B, whose product is then no change at all. By default left alone are biases and norms'
        scales, as is usual; a rotation's parameters, which are bounded by construction, so that
        decay would only turn it back (and shrink BOFT's scale, which rests at one, to zero); and a
        hybrid's low-rank branch, since LoRA-GA starts at A₀B₀ and computes AB − A₀B₀: at A = B = 0
        it would subtract A₀B₀ from the pretrained kernel. The leaves of LoRA-GA alone are called as
        LoRA's are; add "a" and "b" for it.
      schedule: how the learning rate goes over the run.

    Raises:
      ValueError: the name is not known, a number is outside its range, or a constant is given that
        the optimizer does not have.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_finite("weight_decay", self.weight_decay)
        direction = _DIRECTIONS[self.name]
        if self.weight_decay and not direction.decays:
            raise ValueError(
                f"{self.name} has no weight decay; use adamw, or set weight_decay to 0"
            )
        for constant in ("b1", "b2", "eps"):
            value = getattr(self, constant)
            if value is None:
                continue
            if constant not in direction.constants:
                taken = ", ".join(direction.constants) or "none of b1, b2 and eps"
                raise ValueError(f"{self.name} has no {constant}; it takes {taken}")
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{constant} must be at least 0 and below 1, but is {value!r}")

    @property
    def constants(self) -> dict[str, float]:
        """b1, b2 and eps as far as the optimizer has them, each as given or as is usual."""
        return {
            name: usual if getattr(self, name) is None else getattr(self, name)
            for name, usual in _DIRECTIONS[self.name].constants.items()
        }


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """The learning rate by step (from 0) that `make_optimizer` uses, for logging."""
    return make_schedule(settings.schedule, settings.learning_rate, total_steps)


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, *, mixing: MixingSettings | None = None
) -> optax.GradientTransformationExtraArgs:
    """Composes clipping → (direction, weight decay) inside the hybrid's mixing → learning rate.

    Clipping by the norm over all leaves comes first, as everywhere, so that one bad batch does not
    get into the moments. It does not touch λ: it multiplies every gradient by one number, which
    cancels in each of the mixing's ratios. The learning rate comes last, for a step of a rate of
    zero would leave "predicted_decrease" nothing to go by.

    State and arithmetic are in float32 whatever the dtype of gradients and parameters: a second
    moment in bfloat16 cannot follow a decay of 0.999. The updates are float32 as well; add them
    with `optax.apply_updates`, which casts to the parameters' dtype.

    Differences from optax: adafactor's and lion's statistics are as there, but weight decay is
    always multiplied by the learning rate; and what is a block to adafactor (a leaf, for its root
    mean squares) is here a whole stack of layers.

    Args:
      settings: which optimizer and how fast.
      total_steps: how many steps the run takes; where the schedule ends.
      mixing: how the branches of a hybrid adapter are weighed; None without one.

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
    if mixing is not None:
        descent = hybrid_mixing(descent, mixing)
    steps = [descent, optax.scale_by_schedule(learning_rate_schedule(settings, total_steps))]
    if settings.learning_rates:
        relative = {c: r / settings.learning_rate for c, r in settings.learning_rates.items()}
        steps.append(_scale_components(relative))
    if settings.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    return _in_float32(optax.chain(*steps))


def component_values(tree: Any, values: Mapping[str, Any], default: Any) -> Any:
    """For every leaf the value of a component of its path, or the default.

    Args:
      tree: of nested dictionaries.
      values: by path component; of several in one path the innermost decides.
      default: of a leaf with none of them in its path.

    Example:
      >>> component_values({"head": {"kernel": 0, "bias": 0}, "q": {"a": 0}}, {"head": 5.0}, 1.0)
      {'head': {'bias': 5.0, 'kernel': 5.0}, 'q': {'a': 1.0}}
    """

    def value(key_path: tuple[Any, ...], leaf: Any) -> Any:
        del leaf
        return next((values[c] for c in reversed(_components(key_path)) if c in values), default)

    return jax.tree_util.tree_map_with_path(value, tree)


def decay_mask(tree: Any, no_decay: tuple[str, ...] = NO_DECAY) -> Any:
    """Which leaves decay: those with none of the names in their path.

    Example:
      >>> decay_mask({"q": {"kernel": {"a": 0, "b": 0}, "bias": 0}, "norm": {"scale": 0}})
      {'norm': {'scale': False}, 'q': {'bias': False, 'kernel': {'a': True, 'b': True}}}
    """
    return component_values(tree, dict.fromkeys(no_decay, False), True)


def _components(key_path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", "")) for key in key_path]


def _scale_components(values: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates under each component by its value."""

    def init(params: Any) -> optax.EmptyState:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        known = {component for path in paths for component in _components(path)}
        unknown = sorted(values.keys() - known)
        # optax.tree_map_params looks at the state of a placeholder, which has no leaves.
        if paths and unknown:
            raise ValueError(
                f"learning_rates names {unknown[0]!r}, but nothing that is trained has that in its"
                f" path; the components are {', '.join(sorted(known))}"
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factors = component_values(updates, values, 1.0)
        return jax.tree.map(lambda step, factor: step * factor, updates, factors), state

    return optax.GradientTransformation(init, update)


def _in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on at least float32, with JAX's standard promotion of dtypes.

    optax's own arithmetic mixes integers and floats, which a program that asked JAX for strict
    promotion would otherwise be refused.
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
