"""The layers models are made of. Each is written for one transformer block; blocks are stacked.

Modules are built abstractly, by `nnx.eval_shape`: what their parameters start as stands in the
metadata of `parameter`.

Chains of elementwise operations keep their inputs for the backward pass, and compute what is
between again: that is faster than writing it to memory and reading it back.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core import linear
from peft_jax.core.activation_axes import input_axis
from peft_jax.parallel import constrain_features


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], *, mean: float = 0.0, stddev: float = 0.0
) -> nnx.Param:
    """A parameter with the logical names of its axes and the distribution it starts with.

    Args:
      shape: of the array.
      axes: the logical name of each axis.
      mean: of the normal distribution it is drawn from.
      stddev: of that distribution; 0 for a constant.
    """
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, mean=mean, stddev=stddev)


recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Of a function of arrays: its backward pass keeps the arguments, and nothing in between."""


class Linear(nnx.Module):
    """y = x W + b, W [in, out] read as whatever kernel is bound, b [out] if there is one.

    Args:
      d_in: input features.
      d_out: output features.
      axes: logical names of W's axes.
      bias: whether there is a b.
      stddev: the standard deviation W starts with.
    """

    def __init__(self, d_in: int, d_out: int, *, axes: tuple[str, str], bias: bool, stddev: float):
        self.features = axes[1]
        self.kernel = parameter((d_in, d_out), axes, stddev=stddev)
        self.bias = parameter((d_out,), axes[1:]) if bias else nnx.data(None)
        self.input_axis = axes[0]

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """The map of `x`, in the dtype of `x`."""
        with input_axis(self.input_axis):
            y = constrain_features(linear(x, self.kernel.get_value()), self.features)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embedding(nnx.Module):
    """A table [vocab, embed] of token embeddings.

    Args:
      vocab_size: rows.
      features: columns.
      stddev: the standard deviation the table starts with.
    """

    def __init__(self, vocab_size: int, features: int, *, stddev: float):
        self.embedding = parameter((vocab_size, features), ("vocab", "embed"), stddev=stddev)

    def __call__(
        self, tokens: Int[Array, "batch tokens"], dtype: jnp.dtype
    ) -> Float[Array, "batch tokens embed"]:
        """The tokens' rows, in `dtype`."""
        rows = jnp.take(self.embedding.get_value(), tokens, axis=0)
        return constrain_features(rows.astype(dtype), "embed")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich, 2019, arXiv 1910.07467).

    Args:
      features: the size of the last axis.
      epsilon: added to the mean square.
    """

    def __init__(self, features: int, *, epsilon: float):
        self.scale = parameter((features,), ("norm",), mean=1.0)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """The normalized `x`, computed in float32, in the dtype of `x`."""
        return recomputed(self._normalize)(x, self.scale.get_value())

    def _normalize(self, x: Array, scale: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis (Ba et al., 2016, arXiv 1607.06450).

    Args:
      features: the size of the last axis.
      epsilon: added to the variance.
    """

    def __init__(self, features: int, *, epsilon: float):
        self.scale = parameter((features,), ("norm",), mean=1.0)
        self.bias = parameter((features,), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """The normalized `x`, computed in float32, in the dtype of `x`."""
        return recomputed(self._normalize)(x, self.scale.get_value(), self.bias.get_value())

    def _normalize(self, x: Array, scale: Array, bias: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + self.epsilon)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
