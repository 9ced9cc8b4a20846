"""Factorizes the stacked matrices of many kernels, grouped by shape and shared out to devices."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.core import Path

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

HIGHEST = jax.lax.Precision.HIGHEST


def map_matrices(
    factorize: Callable[..., Any],
    arrays: Mapping[Path, Sequence[jax.Array]],
    *,
    stacks: Mapping[Path, tuple[int, ...]],
    mesh: AnyMesh | None,
) -> dict[Path, Any]:
    """Maps a function over the matrices of stacked arrays; call it inside `jax.jit`.

    Arrays of one shape are factorized together. Over a mesh, each device factorizes an equal number
    of whole matrices.

    Args:
      factorize: Function of one matrix of each array, which returns a pytree of arrays.
      arrays: Arrays [*stack, ...] by path: the arguments of `factorize`.
      stacks: Leading axes by path.
      mesh: Mesh of devices; None for one device.

    Returns:
      The results by path, stacked as the arrays.
    """
    groups: dict[Hashable, list[Path]] = {}
    for path, given in arrays.items():
        shapes = tuple((x.shape[len(stacks[path]) :], x.dtype) for x in given)
        groups.setdefault(shapes, []).append(path)
    results: dict[Path, Any] = {}
    for paths in groups.values():
        flat = {
            path: [x.reshape(-1, *x.shape[len(stacks[path]) :]) for x in arrays[path]]
            for path in paths
        }
        joined = [jnp.concatenate(parts) for parts in zip(*flat.values(), strict=True)]
        found = _share_out(factorize, joined, mesh)
        start = 0
        for path in paths:
            end = start + flat[path][0].shape[0]
            results[path] = jax.tree.map(
                lambda x, path=path, start=start, end=end: x[start:end].reshape(
                    *stacks[path], *x.shape[1:]
                ),
                found,
            )
            start = end
    return results


def _share_out(
    factorize: Callable[..., Any], stacks: Sequence[jax.Array], mesh: AnyMesh | None
) -> Any:
    """Factorizes stacks [n, ...], divided over the devices of a mesh."""
    if mesh is None:
        return _over_stack(factorize, stacks)
    count = stacks[0].shape[0]
    # Devices beyond the last matrix repeat the first ones.
    index = jnp.arange(-(-count // mesh.size) * mesh.size) % count
    divided = jax.P(mesh.axis_names)
    found = jax.shard_map(
        lambda *local: _over_stack(factorize, local),
        mesh=mesh,
        in_specs=divided,
        out_specs=divided,
    )(*(stack[index] for stack in stacks))
    return jax.tree.map(lambda x: x[:count], found)


def _over_stack(factorize: Callable[..., Any], stacks: Sequence[jax.Array]) -> Any:
    """Factorizes stacks [n, ...] on one device: at once, or on a CPU one matrix after another.

    On a CPU, jaxlib divides batched factorizations over its thread pool and waits there. If the
    pool is small, they take many times as long, or deadlock. With jaxlib 0.10 on two cores, most
    runs did.
    """
    return jax.lax.platform_dependent(
        *stacks,
        cpu=lambda *xs: jax.lax.map(lambda one: factorize(*one), xs),
        default=jax.vmap(factorize),
    )


def orthonormal(columns: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Returns an orthonormal basis of the columns' span, for m ≥ n."""
    return jnp.linalg.qr(columns)[0]


def triplets(
    basis: Float[Array, "m k"], rows: Float[Array, "k n"]
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "n k"]]:
    """Returns the singular triplets of the product of an orthonormal basis and wide rows.

    Only a k x k matrix is left to a singular value decomposition.
    """
    right, triangle = jnp.linalg.qr(rows.T)
    left, s, inner = jnp.linalg.svd(triangle.T, full_matrices=False)
    u = jnp.matmul(basis, left, precision=HIGHEST)
    v = jnp.matmul(right, inner.T, precision=HIGHEST)
    return u, s, v
