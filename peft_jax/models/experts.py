"""A mixture of experts in place of a block's MLP.

A router chooses K of E experts for each token, and the token's output is the weighted sum of
theirs. Experts' kernels are stacked, [experts, in, out], and multiply through `grouped_linear`. No
token is dropped. The logits of the router are computed in float32.

Axes: B batch, T tokens, D embed, E experts, F features of one expert, M rows.

Sources: Shazeer et al., 2017 (arXiv 1701.06538); Fedus et al., 2021 (arXiv 2101.03961).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core import (
    AdaptedKernel,
    GroupedMethod,
    Kernel,
    grouped_linear,
    linear,
    named_products,
)
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive_int
from peft_jax.models.decoder import DecoderConfig, Hidden
from peft_jax.models.layers import parameter, recomputed
from peft_jax.parallel import mix_experts
from peft_jax.parallel.expert_shards import LogicalAxes

Gate = Callable[[Float[Array, "rows both"]], Float[Array, "rows features"]]
"""Maps the joined outputs of an expert's gate and up maps to the input of its down map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens choose experts.

    Attributes:
      num_experts: E.
      experts_per_token: K.
      normalized: Whether a token's weights are the softmax over its K experts, so that they sum to
        one; otherwise over all experts.
    """

    num_experts: int
    experts_per_token: int
    normalized: bool

    weighs_inputs: ClassVar[bool] = False
    """Whether weights multiply the experts' inputs, and not their outputs."""

    def __post_init__(self) -> None:
        check_positive_int("num_experts", self.num_experts)
        check_positive_int("num_experts_per_tok", self.experts_per_token)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.experts_per_token}, but must be at most the number"
                f" of experts, {self.num_experts}"
            )

    def __call__(
        self, logits: Float[Array, "*tokens experts"]
    ) -> tuple[Float32[Array, "*tokens chosen"], Int[Array, "*tokens chosen"]]:
        """Returns the weights and the numbers of each token's experts, largest weight first.

        Example:
          >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
          >>> weights, chosen = Routing(num_experts=3, experts_per_token=2, normalized=True)(logits)
          >>> [round(weight, 4) for weight in weights.tolist()], chosen.tolist()
          ([0.6667, 0.3333], [1, 2])
        """
        logits = logits.astype(jnp.float32)
        largest, chosen = jax.lax.top_k(logits, self.experts_per_token)
        if self.normalized:
            return jax.nn.softmax(largest, axis=-1), chosen
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.exp(largest - total), chosen


class GroupedLinear(nnx.Module):
    """A linear map of every expert: kernels [E, in, out] and, optionally, biases [E, out].

    Args:
      shape: (E, in, out).
      axes: Logical names of the kernels' axes.
      bias: Whether to add biases.
      stddev: Initial standard deviation of the kernels.
    """

    def __init__(
        self, shape: tuple[int, int, int], axes: LogicalAxes, *, bias: bool, stddev: float
    ):
        self.axes = axes
        self.kernel = parameter(shape, axes, stddev=stddev)
        self.bias = parameter(shape[::2], (axes[0], None)) if bias else nnx.data(None)

    def arrays(self) -> tuple[Kernel, Array | None]:
        """Returns the kernels and the biases."""
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()

    def leaf_axes(self) -> list[LogicalAxes]:
        """Returns the logical axes of each leaf of `arrays`."""
        kernel, bias = self.arrays()
        of_adapters: list[LogicalAxes] = []
        while isinstance(kernel, AdaptedKernel):
            # The leaves of a node are those of its base, then its own, sharded by expert or shared.
            own = jax.tree.leaves(kernel.arrays)
            experts = () if cast(GroupedMethod, kernel.method).spans_groups else self.axes[:1]
            of_adapters[:0] = [(*experts, *[None] * (array.ndim - len(experts))) for array in own]
            kernel = kernel.base
        found = [self.axes] * len(jax.tree.leaves(kernel)) + of_adapters
        return found if bias is None else [*found, (self.axes[0], None)]


class Experts(nnx.Module):
    """The experts' gated MLPs, down(gate(gate_up(x))).

    Args:
      config: Architecture.
      count: E.
      features: F; None for `intermediate_size`.
      gate: Nonlinearity and product of the two halves of `gate_up_proj`.
      bias: Whether the two maps have biases.
    """

    def __init__(
        self,
        config: DecoderConfig,
        count: int,
        *,
        features: int | None = None,
        gate: Gate,
        bias: bool = False,
    ):
        embed, features = config.hidden_size, features or config.intermediate_size
        self.gate = gate
        stddev = config.initializer_range
        self.gate_up_proj = GroupedLinear(
            (count, embed, 2 * features), ("experts", "embed", None), bias=bias, stddev=stddev
        )
        self.down_proj = GroupedLinear(
            (count, features, embed), ("experts", None, "embed"), bias=bias, stddev=stddev
        )

    @part("mlp")
    def __call__(
        self, x: Hidden, logits: Float[Array, "batch tokens _"], routing: Routing
    ) -> Hidden:
        """Returns the weighted sum of each token's experts, [B, T, D]."""
        maps = (self.gate_up_proj, self.down_proj)
        arrays = tuple(one.arrays() for one in maps)
        axes = [names for one in maps for names in one.leaf_axes()]
        return mix_experts(
            x,
            logits,
            arrays,
            axes,
            route=routing,
            apply=self._apply,
            weigh_inputs=routing.weighs_inputs,
        )

    def _apply(
        self, rows: Float[Array, "rows embed"], sizes: Int[Array, " experts"], arrays: Any
    ) -> Float[Array, "rows embed"]:
        """Returns each row's expert's output, for rows sorted by expert."""
        gate_up, down = arrays
        with named_products(("embed", "mlp")):
            both = _affine(rows, gate_up, sizes)
        with named_products(("mlp", "embed")):
            return _affine(recomputed(self.gate)(both), down, sizes)


def _affine(
    rows: Float[Array, "rows d_in"],
    arrays: tuple[Kernel, Float[Array, "experts d_out"] | None],
    sizes: Int[Array, " experts"],
) -> Float[Array, "rows d_out"]:
    """Returns x W + b with each row's expert's W and b."""
    kernel, bias = arrays
    y = grouped_linear(rows, kernel, sizes)
    if bias is None:
        return y
    numbers = jnp.arange(rows.shape[0], dtype=sizes.dtype)
    expert = jnp.searchsorted(jnp.cumsum(sizes), numbers, side="right")
    # Rows beyond the last expert's get no bias, and their gradients, which are not defined, none.
    return y + bias.astype(y.dtype).at[expert].get(mode="fill", fill_value=0)


class Router(nnx.Module):
    """Computes the logits of all experts in float32.

    Args:
      config: Architecture.
      count: E.
      bias: Whether to add a bias.
    """

    def __init__(self, config: DecoderConfig, count: int, *, bias: bool = False):
        shape, stddev = (config.hidden_size, count), config.initializer_range
        self.kernel = parameter(shape, ("embed", None), stddev=stddev)
        self.bias = parameter((count,), (None,)) if bias else nnx.data(None)

    @part("mlp")
    def __call__(self, x: Hidden) -> Float32[Array, "batch tokens experts"]:
        """Returns the logits."""
        logits = linear(x.astype(jnp.float32), self.kernel.get_value())
        return logits if self.bias is None else logits + self.bias.get_value().astype(jnp.float32)


class SparseMLP(nnx.Module):
    """A router and its experts.

    Args:
      config: Architecture.
      routing: How tokens choose experts.
      features: See `Experts`.
      gate: See `Experts`.
      bias: Whether router and experts have biases.
      router: Class of the router.
      router_name: Name of the router in checkpoints.
    """

    def __init__(
        self,
        config: DecoderConfig,
        routing: Routing,
        *,
        features: int | None = None,
        gate: Gate,
        bias: bool = False,
        router: type[Router] = Router,
        router_name: str = "gate",
    ):
        count = routing.num_experts
        self.routing, self.router_name = routing, router_name
        setattr(self, router_name, router(config, count, bias=bias))
        self.experts = Experts(config, count, features=features, gate=gate, bias=bias)

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the weighted sum of each token's experts, [B, T, D]."""
        return self.experts(x, getattr(self, self.router_name)(x), self.routing)
