"""Defines the state that a training step updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from peft_jax.core import Tree


@struct.dataclass
class TrainState:
    """State that a training step updates; a pytree, whose buffers are donated.

    It has no random keys, because they derive from the seed and the step.

    Attributes:
      step: Number of steps taken, int32 [].
      trainable: Trainable arrays of the adapter.
      opt_state: State of the optimizer.
    """

    step: Int[Array, ""] | Any
    trainable: Tree
    opt_state: Any

    @staticmethod
    def create(trainable: Tree, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first step."""
        return TrainState(
            step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable)
        )


def abstract_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of the state.

    Args:
      trainable: Trainable arrays, or their shapes.
      optimizer: Optimizer.
    """
    return jax.eval_shape(lambda arrays: TrainState.create(arrays, optimizer), trainable)
