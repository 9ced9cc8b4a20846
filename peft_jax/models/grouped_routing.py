"""Routing that balances experts by corrections, and limits each token to a few groups of experts.

An expert's score is the sigmoid of its logit. Experts are chosen by the scores plus corrections,
which pretraining adjusts so that all are used, and weighted by the scores alone. A token's experts
lie in the few groups whose two best corrected scores have the largest sums.

Axes: B batch, T tokens, E experts, K experts of a token.

Sources: DeepSeek-AI, 2024 (arXiv 2412.19437, section 2.1.2); Wang et al., 2024 (arXiv 2408.15664).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.models.decoder import DecoderConfig, Hidden
from peft_jax.models.experts import Router, Routing
from peft_jax.models.layers import parameter

_EPSILON = 1e-20
"""Added to the sum that weights are divided by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedRouting(Routing):
    """How tokens choose experts of a few groups.

    Attributes:
      normalized: Whether a token's weights are divided by their sum.
      groups: Number of groups of experts.
      groups_per_token: Number of groups that a token's experts lie in.
      scale: Multiplier of the weights.
    """

    groups: int
    groups_per_token: int
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("n_group", self.groups)
        check_positive_int("topk_group", self.groups_per_token)
        check_positive("routed_scaling_factor", self.scale)
        size, rest = divmod(self.num_experts, self.groups)
        if rest or size < 2:
            raise ValueError(
                f"n_group is {self.groups}, but must divide the {self.num_experts} experts into"
                " groups of at least two"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"topk_group is {self.groups_per_token}, but must be at most n_group ="
                f" {self.groups}"
            )
        if self.experts_per_token > self.groups_per_token * size:
            raise ValueError(
                f"num_experts_per_tok is {self.experts_per_token}, but must be at most the number"
                f" of experts of {self.groups_per_token} groups, {self.groups_per_token * size}"
            )

    def __call__(
        self, logits: Float[Array, "*tokens both"]
    ) -> tuple[Float32[Array, "*tokens chosen"], Int[Array, "*tokens chosen"]]:
        """Returns the weights and the numbers of each token's experts.

        Args:
          logits: The experts' scores, then their corrected scores.

        Example:
          >>> routing = GroupedRouting(
          ...     num_experts=4, experts_per_token=1, normalized=False, groups=2,
          ...     groups_per_token=1, scale=2.0)
          >>> scores, corrections = jnp.array([0.9, 0.1, 0.5, 0.6]), jnp.array([0.0, 0.0, 0.2, 0.0])
          >>> weights, chosen = routing(jnp.concatenate([scores, scores + corrections]))
          >>> weights.tolist(), chosen.tolist()
          ([1.0], [2])
        """
        scores, corrected = jnp.split(logits.astype(jnp.float32), 2, axis=-1)
        _, chosen = jax.lax.top_k(self._in_groups(corrected), self.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalized:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _EPSILON)
        return weights * self.scale, chosen

    def _in_groups(
        self, corrected: Float32[Array, "*tokens experts"]
    ) -> Float32[Array, "*tokens experts"]:
        """Returns the scores of the experts in a token's groups, and -inf for others."""
        if self.groups_per_token == self.groups:
            return corrected
        grouped = corrected.reshape(*corrected.shape[:-1], self.groups, -1)
        best, _ = jax.lax.top_k(grouped, 2)
        _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), self.groups_per_token)
        numbers = jnp.arange(self.groups, dtype=groups.dtype)
        is_chosen = jnp.any(groups[..., None, :] == numbers[:, None], axis=-1)
        return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(corrected.shape)


class CorrectedRouter(Router):
    """Computes the scores and the corrected scores of all experts in float32."""

    def __init__(self, config: DecoderConfig, count: int, *, bias: bool = False):
        super().__init__(config, count, bias=bias)
        self.e_score_correction_bias = parameter((count,), (None,), wide=True)

    @part("mlp")
    def __call__(self, x: Hidden) -> Float32[Array, "batch tokens both"]:
        """Returns the scores, then the corrected scores."""
        scores = jax.nn.sigmoid(super().__call__(x))
        corrections = self.e_score_correction_bias.get_value().astype(jnp.float32)
        return jnp.concatenate([scores, scores + corrections], axis=-1)
