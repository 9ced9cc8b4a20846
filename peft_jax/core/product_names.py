"""Names the products of a model's linear maps, for rematerialization policies.

A policy saves values by name (`jax.ad_checkpoint.checkpoint_name`). Every product is named
`LINEAR_OUTPUT`. The product of a base's kernel also has the name of its place in the block, which
`named_products` finds from the logical axes of the kernel. An adapter's own thin products have
none, because recomputing them costs little.
"""

import contextlib
import contextvars
from collections.abc import Iterator

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

LINEAR_OUTPUT = "linear output"
"""Name of every linear map's output."""

ATTENTION_INPUT = "attention input product"
"""Name of the products that are queries, keys and values."""
ATTENTION_OUTPUT = "attention output product"
"""Name of the product of attention's output map."""
MLP_INPUT = "mlp input product"
"""Name of the products that enter the MLP's nonlinearity."""
MLP_OUTPUT = "mlp output product"
"""Name of the product of the MLP's last map."""

LOW_RANK_INPUT = "low-rank coordinates"
"""Name of x A, the small input of B."""

_HEADS = ("heads", "kv_heads")
_place = contextvars.ContextVar[str | None]("peft_jax_product_place", default=None)


def place_of(axes: tuple[str | None, ...]) -> str | None:
    """Returns the name of the products of a kernel with these logical axes; None elsewhere.

    Example:
      >>> place_of(("embed", "kv_heads")), place_of(("mlp", "embed")), place_of(("embed", "vocab"))
      ('attention input product', 'mlp output product', None)
    """
    d_in, d_out = axes[-2:]
    if d_out in _HEADS or d_in in _HEADS:
        return ATTENTION_INPUT if d_out in _HEADS else ATTENTION_OUTPUT
    if d_out == "mlp" or d_in == "mlp":
        return MLP_INPUT if d_out == "mlp" else MLP_OUTPUT
    return None


@contextlib.contextmanager
def named_products(axes: tuple[str | None, ...]) -> Iterator[None]:
    """Names the products of a kernel with these logical axes, while they are traced inside."""
    token = _place.set(place_of(axes))
    try:
        yield
    finally:
        _place.reset(token)


def name_product(y: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_out"]:
    """Returns the product of a base's kernel, named."""
    y, place = checkpoint_name(y, LINEAR_OUTPUT), _place.get()
    return y if place is None else checkpoint_name(y, place)
