"""Names the optimizers of a run, with the constants that each takes."""

import dataclasses
from collections.abc import Callable, Mapping

import optax

from peft_jax.optim.eight_bit import scale_by_adam_8bit
from peft_jax.optim.gradient_grouping import gradient_grouping
from peft_jax.optim.muon import scale_by_muon
from peft_jax.optim.riemannian import riemannian_preconditioning
from peft_jax.optim.scion import scale_by_scion

PRODIGY = "prodigy"
"""The optimizer that estimates one learning rate for all arrays."""

SCHEDULE_FREE = "schedule_free_adamw"
"""The optimizer that averages its iterates."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """An optimizer's update direction, before weight decay and learning rate.

    Attributes:
      build: Builds the transformation from the arguments named in `constants`.
      constants: Those of the settings' constants that it takes, with their default values.
      decays: Whether it supports decoupled weight decay.
      learning_rate: Peak learning rate to begin with; None for that of the method.
      over_steps: Whether `build` takes `total_steps` as well.
    """

    build: Callable[..., optax.GradientTransformation]
    constants: Mapping[str, float]
    decays: bool = True
    learning_rate: float | None = None
    over_steps: bool = False


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


def _without_momentum(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam without a first moment, which averaging the iterates replaces."""
    del b1  # that of the average
    return optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)


def _sgg(
    b1: float,
    b2: float,
    eps: float,
    b3: float,
    clusters: int,
    recluster_ratio: float,
    total_steps: int,
) -> optax.GradientTransformation:
    """Returns Adam scaled by groups, which are formed anew each `recluster_ratio` of the run."""
    every = max(1, round(recluster_ratio * total_steps))
    return gradient_grouping(b1, b2, eps, b3=b3, clusters=clusters, every=every)


def _riemannian(b1: float, b2: float, eps: float, damping: float) -> optax.GradientTransformation:
    """Returns Adam of preconditioned gradients."""
    return optax.chain(
        riemannian_preconditioning(damping), optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    )


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

DIRECTIONS: dict[str, Direction] = {
    "adamw": Direction(optax.scale_by_adam, _ADAM),
    "adam": Direction(optax.scale_by_adam, _ADAM, decays=False),
    "nadamw": Direction(_nadam, _ADAM),
    "lion": Direction(optax.scale_by_lion, {"b1": 0.9, "b2": 0.99}),
    "adafactor": Direction(_adafactor, {}),
    "rmsprop": Direction(_rmsprop, {"b2": 0.9, "eps": 1e-8}),
    "sgd": Direction(_sgd, {"b1": 0.0}),
    "adamw_8bit": Direction(scale_by_adam_8bit, _ADAM),
    "muon": Direction(scale_by_muon, {**_ADAM, "b1": 0.95}),
    "scion": Direction(scale_by_scion, {"b1": 0.9}),
    "sgg": Direction(
        _sgg, {**_ADAM, "b3": 0.99, "clusters": 3, "recluster_ratio": 0.05}, over_steps=True
    ),
    "riemannian_adamw": Direction(_riemannian, {**_ADAM, "damping": 0.01}),
    SCHEDULE_FREE: Direction(_without_momentum, _ADAM),
    # Its schedule is part of its direction, so `make_optimizer` builds it.
    PRODIGY: Direction(optax.identity, _ADAM, learning_rate=1.0),
}
"""Optimizers by the name in `optimizer.name`."""

OPTIMIZERS = tuple(DIRECTIONS)

CONSTANTS = ("b1", "b2", "b3", "eps", "damping", "clusters", "recluster_ratio")
"""Settings that belong to some optimizers; None for the optimizer's default."""
