"""Routes tokens to experts that are sharded over a mesh, without dropping any.

Experts are sharded along the mesh axes of the logical axis "experts": "expert", which shards rows
of the batch elsewhere, and "tensor", which shards tokens of a row. Devices that hold different
experts share their tokens: they are gathered along those axes, each device computes its own
experts' part of every token, and the parts are summed and scattered back. So a token reaches its
experts however many others choose them too, and results do not depend on the mesh. Rows are sorted
by expert, and those of other devices' experts come last and cost no product.

Axes: B batch, T tokens, D embed, E experts, K experts of a token, M rows, one for each token and
expert of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.layout import use_layout
from peft_jax.core import LINEAR_OUTPUT
from peft_jax.core.scopes import mean_share
from peft_jax.parallel.activation_sharding import LogicalAxes, activation_spec, active_mesh, spans
from peft_jax.parallel.rules import as_tuple

Route = Callable[
    [Float[Array, "batch tokens _"]],
    tuple[Float32[Array, "batch tokens chosen"], Int[Array, "batch tokens chosen"]],
]
"""Maps the router's logits to the weights and the numbers of each token's experts."""

Apply = Callable[[Float[Array, "rows embed"], Int[Array, " experts"], Any], Array]
"""Maps rows [M, D] sorted by expert, the experts' numbers of rows and their arrays to [M, D]."""

_TOKENS = ("batch", "tokens", None)

_MOST_ROWS = 2**16
"""Largest number of rows that are computed at once, which bounds the memory of a large group."""


def mix_experts(
    x: Float[Array, "batch tokens embed"],
    logits: Float[Array, "batch tokens _"],
    arrays: Any,
    axes: Sequence[LogicalAxes],
    *,
    route: Route,
    apply: Apply,
    weigh_inputs: bool = False,
) -> Float[Array, "batch tokens embed"]:
    """Returns the weighted sum of each token's experts.

    Args:
      x: Activations of the residual stream.
      logits: The router's logits, or all else that `route` needs for each token.
      arrays: Pytree of the experts' arrays [E, ...].
      axes: Logical axes of each leaf of `arrays`; the first is "experts".
      route: Chooses each token's experts.
      apply: Computes the experts.
      weigh_inputs: Whether weights multiply the experts' inputs, and not their outputs.
    """
    experts, mesh = jax.tree.leaves(arrays)[0].shape[0], active_mesh()
    mixed = functools.partial(_mixed_in_parts, apply=apply, weigh_inputs=weigh_inputs)
    if mesh is None:
        return mixed(x, *route(logits), arrays, first=None, count=experts)
    leaves, structure = jax.tree.flatten(arrays)
    specs = [activation_spec(leaf.shape, n, mesh) for leaf, n in zip(leaves, axes, strict=True)]
    tokens_spec = activation_spec(x.shape, _TOKENS, mesh)
    over = spans(experts, "experts")
    gathered = [[a for a in over if a in as_tuple(entry)] for entry in tokens_spec[:2]]
    replicated = tuple(axis for axis in over if not any(axis in one for one in gathered))

    # Of what is gathered or computed, keeps the products only.
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT)
    )
    def on_device(x: Array, logits: Array, *shards: Array) -> Array:
        found = (x, *route(logits))
        for dimension, names in enumerate(gathered):
            if names:
                found = tuple(
                    jax.lax.all_gather(one, tuple(names), axis=dimension, tiled=True)
                    for one in found
                )
        whole = [_gathered(shard, spec) for shard, spec in zip(shards, specs, strict=True)]
        parts = _size(over, mesh)
        count = experts // parts
        with use_layout(None), mean_share(parts):
            y = mixed(
                *found,
                jax.tree.unflatten(structure, whole),
                first=jax.lax.axis_index(over) * count if over else None,
                count=count,
            )
        for dimension, names in enumerate(gathered):
            if names:
                y = jax.lax.psum_scatter(y, tuple(names), scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(y, replicated) if replicated else y

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens_spec, tokens_spec, *specs),
        out_specs=tokens_spec,
        check_vma=False,
    )(x, logits, *leaves)


def _size(axes: Sequence[str], mesh: AbstractMesh) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _gathered(shard: Array, spec: PartitionSpec) -> Array:
    """Gathers all axes of a device's shard but the first, that of its experts."""
    for dimension, names in enumerate(spec[1:], start=1):
        if names is not None:
            shard = jax.lax.all_gather(shard, names, axis=dimension, tiled=True)
    return shard


def _mixed_in_parts(
    x: Float[Array, "batch tokens embed"],
    weights: Float32[Array, "batch tokens chosen"],
    chosen: Int[Array, "batch tokens chosen"],
    arrays: Any,
    **settings: Any,
) -> Float[Array, "batch tokens embed"]:
    """Returns the weighted sum of experts, some tokens after the other; see `_mixed`."""
    tokens, per_token = x.shape[0] * x.shape[1], chosen.shape[-1]
    parts = -(-tokens * per_token // _MOST_ROWS)
    if parts == 1:
        return _mixed(x, weights, chosen, arrays, **settings)
    size = -(-tokens // parts)

    def split(array: Array) -> Array:
        flat = array.reshape(tokens, -1)
        padded = jnp.pad(flat, ((0, parts * size - tokens), (0, 0)))
        return padded.reshape(parts, 1, size, -1)

    y = jax.lax.map(
        lambda part: _mixed(part[0], part[1], part[2], arrays, **settings),
        (split(x), split(weights), split(chosen)),
    )
    return y.reshape(parts * size, -1)[:tokens].reshape(x.shape)


def _mixed(
    x: Float[Array, "batch tokens embed"],
    weights: Float32[Array, "batch tokens chosen"],
    chosen: Int[Array, "batch tokens chosen"],
    arrays: Any,
    *,
    apply: Apply,
    weigh_inputs: bool,
    first: Any,
    count: int,
) -> Float[Array, "batch tokens embed"]:
    """Returns the weighted sum of `count` experts.

    Args:
      x: Activations.
      weights: Weights of each token's experts.
      chosen: Numbers of each token's experts.
      arrays: The experts' arrays [count, ...].
      apply: Computes the experts.
      weigh_inputs: Whether weights multiply the experts' inputs, and not their outputs.
      first: Number of the first expert of `arrays`; None if these are all. Others add nothing.
      count: Number of experts of `arrays`.
    """
    embed, expert = x.shape[-1], chosen.reshape(-1)
    if first is not None:
        expert = expert - first
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    place = jnp.argsort(order)
    numbers = jnp.arange(count, dtype=expert.dtype)
    ends = jnp.searchsorted(expert[order], numbers, side="right").astype(jnp.int32)

    def defined(rows: Array) -> Array:
        """Sets rows without an expert to zero, whose products and gradients are not defined."""
        if first is None:
            return rows
        is_own = jnp.arange(rows.shape[0], dtype=jnp.int32) < ends[-1]
        return jnp.where(is_own[:, None], rows, jnp.zeros_like(rows))

    rows = defined(_rows_of(x.reshape(-1, embed), order, place))
    if weigh_inputs:
        of_rows = _permuted(weights.reshape(-1, 1), order, place)
        rows = (rows.astype(jnp.float32) * of_rows).astype(x.dtype)
    y = defined(apply(rows, jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32)), arrays))
    y = _permuted(y, place, order).reshape(*weights.shape, embed).astype(jnp.float32)
    if not weigh_inputs:
        y = y * weights[..., None]
    return jnp.sum(y, axis=-2).astype(x.dtype)


@jax.custom_vjp
def _permuted(rows: Array, order: Array, place: Array) -> Array:
    """Returns rows in another order; the gradient is gathered too, instead of scattered.

    Args:
      rows: Rows [M, D].
      order: Number of the row to put at each place.
      place: Inverse of `order`.
    """
    del place
    return rows[order]


def _permuted_forward(rows: Array, order: Array, place: Array) -> tuple[Array, Array]:
    return rows[order], place


def _permuted_backward(place: Array, dy: Array) -> tuple[Array, None, None]:
    return dy[place], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@jax.custom_vjp
def _rows_of(x: Array, order: Array, place: Array) -> Array:
    """Returns the rows [M, D] of tokens [M / K, D], of which each has K; see `_permuted`."""
    del place
    return x[order // (order.shape[0] // x.shape[0])]


def _rows_forward(x: Array, order: Array, place: Array) -> tuple[Array, tuple[Array, int]]:
    return _rows_of(x, order, place), (place, x.shape[0])


def _rows_backward(kept: tuple[Array, int], dy: Array) -> tuple[Array, None, None]:
    place, tokens = kept
    by_token = dy[place].reshape(tokens, -1, dy.shape[-1])
    return jnp.sum(by_token, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


_rows_of.defvjp(_rows_forward, _rows_backward)
