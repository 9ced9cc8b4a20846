"""Computes the cross-entropy over a large vocabulary in chunks of tokens.

Axes: N tokens, D embed, V vocab, C tokens of a chunk, K chunks.

Llama 3 has a vocabulary of 128,256. The logits of 8 rows of 4,096 tokens take 16 GiB in float32,
several times as much as a block's other activations. Here only one chunk's logits exist at a time.
A chunk's gradient is computed while its logits exist, so that they are neither saved for the
backward pass nor recomputed in it.

Over a mesh, the head's rows are gathered once before the chunks, not for each of them. Meanwhile a
device holds its columns with all rows, D V / tensor values in the dtype of the hidden states.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from peft_jax.core import AdaptedKernel, Kernel
from peft_jax.models.logit_rule import PRODUCTS, LogitRule, head_products
from peft_jax.parallel import constrain

_Gradients = tuple[Any, tuple[Any, ...], Any]
"""Gradients of hidden states, head leaves and weights; None for those that need none."""


def chunked_cross_entropy(
    hidden: Float[Array, "tokens embed"],
    head_kernel: Kernel,
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    chunk_size: int,
    logit_rule: LogitRule = PRODUCTS,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the cross-entropy summed over tokens, and the sum of their weights.

    The loss is Σ_i w_i (log Σ_v exp z_iv - z_i,target). The logits z are float32, computed from
    hidden · head_kernel by the model's rule.
    The pass that computes the loss also computes its gradient with respect to a chunk's logits,
    w (softmax z - onehot), and from it the gradients of the hidden states and of trainable head
    leaves. Gradients that are not needed are not computed: a frozen head costs one product forward
    and one backward, and evaluation only computes the loss.

    Chunks are strided: token i belongs to chunk i mod K, so that each chunk has an equal share of
    every device's tokens. The number of chunks is the smallest divisor of N from N / chunk_size on,
    if it is below twice that. Otherwise N is padded.

    Args:
      hidden: States after the final norm, [N, D], in any floating dtype. Products are computed in
        it and accumulated in float32.
      head_kernel: Kernel [D, V], or an `AdaptedKernel` over one; for tied embeddings, the
        transposed table.
      targets: Token to predict at each position, in [0, V); ignored where the weight is 0.
      weights: Weight of each position; 0 excludes it.
      chunk_size: Maximum number of positions whose logits are held at once, over all devices.
      logit_rule: Computes logits from the products of the head (`CausalLM.logit_rule`).

    Returns:
      Sum of weighted losses in nats and sum of weights, both float32 []. The mean is their
      quotient. The sums add up over microbatches and devices.

    Raises:
      ValueError: `chunk_size` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, head = jnp.zeros((4, 8)), jnp.ones((8, 10))
      >>> loss, count = chunked_cross_entropy(
      ...     hidden, head, jnp.arange(4), jnp.array([1.0, 1.0, 1.0, 0.0]), chunk_size=2)
      >>> round(float(loss / count), 4)  # every token is equally likely: log 10
      2.3026
    """
    count = _chunk_count(hidden.shape[0], chunk_size)
    leaves, treedef = jax.tree.flatten(head_kernel)
    weights = weights.astype(jnp.float32)
    loss = _summed_loss(
        treedef,
        logit_rule,
        _strided(hidden, count),
        tuple(leaves),
        _strided(targets, count),
        _strided(weights, count),
    )
    return loss, jnp.sum(weights)


def chunked_token_scores(
    hidden: Float[Array, "tokens embed"],
    head_kernel: Kernel,
    targets: Int[Array, " tokens"],
    *,
    chunk_size: int,
    logit_rule: LogitRule = PRODUCTS,
) -> tuple[Float32[Array, " tokens"], Bool[Array, " tokens"]]:
    """Returns the log-probability of every target and whether it is the likeliest token.

    Args:
      hidden: States after the final norm, [N, D].
      head_kernel: Kernel [D, V], or an `AdaptedKernel` over one.
      targets: Token at each position, in [0, V).
      chunk_size: Maximum number of positions whose logits are held at once.
      logit_rule: Computes logits from the products of the head (`CausalLM.logit_rule`).

    Returns:
      Log-probabilities in nats, float32 [N], and whether the target has the largest logit,
      bool [N]. Of several largest logits the first counts.

    Raises:
      ValueError: `chunk_size` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> scores, right = chunked_token_scores(
      ...     jnp.eye(2), 3.0 * jnp.eye(2), jnp.array([0, 0]), chunk_size=1)
      >>> [round(x, 4) for x in scores.tolist()], right.tolist()
      ([-0.0486, -3.0486], [True, False])
    """
    tokens = hidden.shape[0]
    count = _chunk_count(tokens, chunk_size)
    head_kernel = _with_all_rows(head_kernel, hidden.dtype)

    def score(carry: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Any]:
        index, h, t = chunk
        logits = logit_rule(head_products(h, _with_chunk_dropout(head_kernel, index)))
        log_normalizer, at_target = _normalizer_and_target(logits, t)
        return carry, (at_target - log_normalizer, jnp.argmax(logits, axis=-1).astype(t.dtype) == t)

    chunks = (jnp.arange(count), _strided(hidden, count), _strided(targets, count))
    _, (scores, right) = jax.lax.scan(score, None, chunks)
    return scores.T.reshape(-1)[:tokens], right.T.reshape(-1)[:tokens]


def _chunk_count(tokens: int, chunk_size: int) -> int:
    """Returns the smallest number of chunks, or a slightly larger one that divides `tokens`."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    fewest = max(1, -(-tokens // chunk_size))
    return next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)


def _strided(x: Array, count: int) -> Array:
    """Returns [N, ...] as chunks [K, C, ...] of every K-th token, padded with zeros."""
    missing = -x.shape[0] % count
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)


def _with_all_rows(kernel: Kernel, dtype: Any = None) -> Kernel:
    """Returns the head with the rows of its base gathered, so that no chunk gathers them again.

    An array is cast to `dtype` first, so that no more than that is sent and held. The base of an
    adapted head is not cast, because its method may need the stored values.
    """
    if isinstance(kernel, AdaptedKernel):
        return dataclasses.replace(kernel, base=_with_all_rows(kernel.base))
    return constrain(kernel if dtype is None else kernel.astype(dtype), (None, "vocab"))


def _with_chunk_dropout(kernel: Kernel, index: Array) -> Kernel:
    """Returns the kernel with the chunk's own dropout key, so that masks differ."""
    if not isinstance(kernel, AdaptedKernel):
        return kernel
    key = kernel.dropout_key
    return dataclasses.replace(
        kernel,
        base=_with_chunk_dropout(kernel.base, index),
        dropout_key=None if key is None else jax.random.fold_in(key, index),
    )


def _normalizer_and_target(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Returns log Σ exp z and the target's z, [C] each.

    The target's logit is a masked sum, because indexing along a sharded vocabulary would gather it.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return log_normalizer, at_target


def _is_target(logits: Array, targets: Array) -> Array:
    """Returns one-hot targets, bool [C, V], which the compiler fuses into their use."""
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(
    treedef: Any,
    rule: LogitRule,
    hidden: Array,
    leaves: tuple[Any, ...],
    targets: Array,
    weights: Array,
) -> Array:
    """Returns the weighted sum of losses, without saving anything for a gradient.

    Args:
      treedef: Structure of the head's kernel; static.
      rule: Computes logits from products; static.
      hidden: States [K, C, D].
      leaves: Leaves of the head's kernel.
      targets: Targets [K, C].
      weights: Weights [K, C], float32.
    """
    kernel = _with_all_rows(jax.tree.unflatten(treedef, leaves), hidden.dtype)

    def add(total: Array, chunk: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        index, h, t, w = chunk
        logits = rule(head_products(h, _with_chunk_dropout(kernel, index)))
        log_normalizer, at_target = _normalizer_and_target(logits, t)
        return total + jnp.sum(w * (log_normalizer - at_target)), None

    chunks = (jnp.arange(hidden.shape[0]), hidden, targets, weights)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _summed_loss_forward(
    treedef: Any,
    rule: LogitRule,
    hidden: Any,
    leaves: tuple[Any, ...],
    targets: Any,
    weights: Any,
) -> tuple[Array, _Gradients]:
    """Returns the loss, and as residuals its gradients.

    Arrays come as pairs (value, perturbed); `perturbed` says whether a gradient is needed.
    """
    kernel = jax.tree.unflatten(treedef, [leaf.value for leaf in leaves])
    held = jax.tree.leaves(_with_all_rows(kernel, hidden.value.dtype))
    learned = tuple(value for value, leaf in zip(held, leaves, strict=True) if leaf.perturbed)

    def kernel_with(learned: tuple[Array, ...], index: Array) -> Kernel:
        values = iter(learned)
        merged = [
            next(values) if leaf.perturbed else value
            for value, leaf in zip(held, leaves, strict=True)
        ]
        return _with_chunk_dropout(jax.tree.unflatten(treedef, merged), index)

    def add(carry: Any, chunk: tuple[Array, Array, Array, Array]) -> tuple[Any, Any]:
        total, learned_sums = carry
        index, h, t, w = chunk
        products, pull_back = _products_and_pull_back(
            h, learned, lambda learned: kernel_with(learned, index)
        )
        logits = rule(products)
        log_normalizer, at_target = _normalizer_and_target(logits, t)
        losses = log_normalizer - at_target
        probabilities = jnp.exp(logits - log_normalizer[:, None])
        onehot = _is_target(logits, t).astype(jnp.float32)
        of_products = (probabilities - onehot) * w[:, None]
        if not rule.is_identity:
            of_products *= rule.slope(logits)
        of_hidden, of_learned = pull_back(of_products)
        learned_sums = jax.tree.map(
            lambda total, one: total + one.astype(jnp.float32), learned_sums, of_learned
        )
        kept = (of_hidden if hidden.perturbed else None, losses if weights.perturbed else None)
        return (total + jnp.sum(w * losses), learned_sums), kept

    zeros = tuple(jnp.zeros(leaf.shape, jnp.float32) for leaf in learned)
    chunks = (jnp.arange(hidden.value.shape[0]), hidden.value, targets.value, weights.value)
    (total, of_learned), (of_hidden, of_weights) = jax.lax.scan(
        add, (jnp.zeros((), jnp.float32), zeros), chunks
    )
    learned_sums = iter(of_learned)
    of_leaves = tuple(
        next(learned_sums).astype(leaf.value.dtype) if leaf.perturbed else None for leaf in leaves
    )
    return total, (of_hidden, of_leaves, of_weights)


def _summed_loss_backward(
    treedef: Any, rule: LogitRule, gradients: _Gradients, cotangent: Array
) -> tuple[Any, ...]:
    """Returns the gradients of the forward pass times the cotangent of the loss."""
    del treedef, rule

    def scale(gradient: Array) -> Array:
        return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype)

    of_hidden, of_leaves, of_weights = jax.tree.map(scale, gradients)
    return of_hidden, of_leaves, None, of_weights


_summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward, symbolic_zeros=True)


def _products_and_pull_back(
    h: Array, learned: tuple[Array, ...], kernel_with: Callable[[tuple[Array, ...]], Kernel]
) -> tuple[Array, Callable[[Array], tuple[Array, tuple[Array, ...]]]]:
    """Returns products [C, V], and the map from their gradient to those of `h` and `learned`.

    For a plain array the map is explicit, so that both products accumulate in float32 with operands
    in the dtype of `h`, as the forward product does.
    """
    kernel = kernel_with(learned)
    if isinstance(kernel, AdaptedKernel):
        return jax.vjp(lambda h, learned: head_products(h, kernel_with(learned)), h, learned)

    def pull_back(gradient: Array) -> tuple[Array, tuple[Array, ...]]:
        g = gradient.astype(h.dtype)
        of_hidden = jnp.matmul(g, kernel.astype(h.dtype).T, preferred_element_type=jnp.float32)
        if not learned:
            return of_hidden.astype(h.dtype), ()
        of_kernel = jnp.matmul(h.T, g, preferred_element_type=jnp.float32)
        return of_hidden.astype(h.dtype), (of_kernel,)

    return head_products(h, kernel), pull_back
