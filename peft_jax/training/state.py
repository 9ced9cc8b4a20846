"""What changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from peft_jax.core import Tree


@struct.dataclass
class TrainState:
    """What a training step takes and gives back; a pytree, whose buffers are donated.

    Random keys are not among it: they are made of the seed and the step.

    Attributes:
      step: how many steps have been taken, int32 [].
      trainable: the adapter's trained arrays.
      opt_state: the optimizer's state.
    """

    step: Int[Array, ""] | Any
    trainable: Tree
    opt_state: Any

    @staticmethod
    def create(trainable: Tree, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        return TrainState(
            step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable)
        )


def abstract_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without making it.

    Args:
      trainable: the adapter's arrays, or abstract ones.
      optimizer: the optimizer.
    """
    return jax.eval_shape(lambda arrays: TrainState.create(arrays, optimizer), trainable)
