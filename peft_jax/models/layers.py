"""Layers of transformer blocks: linear maps, embeddings and norms.

Each layer is written for one block; `blocks` stacks them. Modules are built abstractly by
`nnx.eval_shape`, so the initial distribution of a parameter is part of its metadata.

Chains of elementwise operations save only their inputs for the backward pass and recompute the
intermediate values, which is faster than writing them to memory and reading them back.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core import linear, named_products, take_rows
from peft_jax.core.activation_axes import input_axis
from peft_jax.core.integer_products import partition_integers
from peft_jax.core.scopes import part
from peft_jax.parallel import column_products, constrain_features, integer_row_product


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    mean: float = 0.0,
    stddev: float = 0.0,
    wide: bool = False,
) -> nnx.Param:
    """Returns a parameter annotated with logical axes and its initial normal distribution.

    Args:
      shape: Shape of the array.
      axes: Logical name of each axis; None for one that is never sharded.
      mean: Mean of the initial distribution.
      stddev: Standard deviation of the initial distribution; 0 for a constant.
      wide: Whether it is always held in float32.
    """
    value = jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, axes=axes, mean=mean, stddev=stddev, wide=wide, layers=())


recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Wraps a function of arrays so that its backward pass saves the arguments only."""


class Linear(nnx.Module):
    """Computes y = x W + b with W [in, out] and, optionally, b [out].

    W may be any kernel: an array, a quantized array or an adapted kernel.

    Args:
      d_in: Number of input features.
      d_out: Number of output features.
      axes: Logical names of W's axes; None for outputs that are not sharded.
      bias: Whether to add b.
      stddev: Initial standard deviation of W.
    """

    def __init__(
        self, d_in: int, d_out: int, *, axes: tuple[str, str | None], bias: bool, stddev: float
    ):
        self.features = axes[1]
        self.kernel = parameter((d_in, d_out), axes, stddev=stddev)
        self.bias = parameter((d_out,), axes[1:]) if bias else nnx.data(None)
        self.input_axis = axes[0]

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Returns y in the dtype of `x`."""
        axes = (self.input_axis, self.features)
        rows = functools.partial(integer_row_product, axes=axes)
        with input_axis(axes[0]), named_products(axes), partition_integers(rows):
            return self._finish(linear(x, self.kernel.get_value()))

    def _finish(self, y: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_out"]:
        """Constrains a product's sharding, and adds the bias."""
        y = constrain_features(y, self.features)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

    @staticmethod
    def each(
        x: Float[Array, "batch tokens d_in"], *maps: "Linear"
    ) -> tuple[Float[Array, "batch tokens _"], ...]:
        """Returns each map of the residual stream, whose tokens are gathered once for all.

        Args:
          x: Activations of the residual stream.
          maps: Maps whose columns are sharded.
        """
        kernels = [(one.kernel.get_value(), (one.input_axis, one.features)) for one in maps]
        products = column_products(x, kernels)
        return tuple(
            one(x) if y is None else one._finish(y) for one, y in zip(maps, products, strict=True)
        )


class Embedding(nnx.Module):
    """A table [vocab, embed] of token embeddings.

    Args:
      vocab_size: Number of rows.
      features: Number of columns.
      stddev: Initial standard deviation of the table.
    """

    def __init__(self, vocab_size: int, features: int, *, stddev: float):
        self.embedding = parameter((vocab_size, features), ("vocab", "embed"), stddev=stddev)

    @part("embedding")
    def __call__(
        self, tokens: Int[Array, "batch tokens"], dtype: jnp.dtype
    ) -> Float[Array, "batch tokens embed"]:
        """Returns the embeddings of `tokens` in `dtype`."""
        rows = take_rows(self.embedding.get_value(), tokens)
        return constrain_features(rows.astype(dtype), "embed")


@part("norm")
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def unit_rms(x: Float[Array, "*batch features"], epsilon: float) -> Float[Array, "*batch features"]:
    """Returns x / rms(x) over the last axis, computed in float32: an RMS norm without a scale."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Computes x / rms(x) * scale over the last axis (Zhang and Sennrich, 2019, arXiv 1910.07467).

    Args:
      features: Size of the last axis.
      epsilon: Added to the mean square.
      offset: Number added to the stored scale.
    """

    def __init__(self, features: int, *, epsilon: float, offset: float = 0.0):
        self.scale = parameter((features,), ("norm",), mean=1.0 - offset)
        self.epsilon, self.offset = epsilon, offset

    @part("norm")
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Returns the normalized `x` in the dtype of `x`, computed in float32."""
        return recomputed(self._normalize)(x, self.scale.get_value())

    def _normalize(self, x: Array, scale: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = scale.astype(jnp.float32)
        return (wide * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Computes (x - mean) / std * scale + bias over the last axis.

    Source: Ba et al., 2016, arXiv 1607.06450.

    Args:
      features: Size of the last axis.
      epsilon: Added to the variance.
      bias: Whether to add a bias.
    """

    def __init__(self, features: int, *, epsilon: float, bias: bool = True):
        self.scale = parameter((features,), ("norm",), mean=1.0)
        self.bias = parameter((features,), ("norm",)) if bias else nnx.data(None)
        self.epsilon = epsilon

    @part("norm")
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Returns the normalized `x` in the dtype of `x`, computed in float32."""
        bias = None if self.bias is None else self.bias.get_value()
        return recomputed(self._normalize)(x, self.scale.get_value(), bias)

    def _normalize(self, x: Array, scale: Array, bias: Array | None) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + self.epsilon)
        scaled = wide * scale.astype(jnp.float32)
        return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)
