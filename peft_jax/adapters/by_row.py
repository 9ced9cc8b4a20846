"""Binds several adapters at once, of which each row of a batch uses one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int32

from kernels_pallas.target_device import target_platform
from peft_jax.adapters.gradient_products import has_stack
from peft_jax.adapters.several import Adapters, find_adapters, reject_experts
from peft_jax.core import (
    AdaptedKernel,
    Kernel,
    Path,
    Tree,
    did_you_mean,
    flatten,
    join_path,
    linear,
    unflatten,
)

_FLOPS_PER_BYTE = {"cpu": 16.0}
_FLOPS_PER_BYTE_OF_ACCELERATORS = 200.0
"""Operations that take as long as reading a byte. The CPU's number was measured with
`benchmarks/adapters_by_row.py`; that of accelerators is about their data sheets'."""


@dataclasses.dataclass(frozen=True)
class LowRankByRow:
    """Low-rank products chosen by row, y_b = x_b W + (x_b A_n) B_n with n = rows[b].

    Arrays: `a` [adapters, d_in, rank], `b` [adapters, rank, d_out], `rows` [batch].
    """

    spans_groups: ClassVar[bool] = False

    def project(
        self,
        x: Float[Array, "batch *tokens d_in"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "batch *tokens d_out"]:
        """Returns x W plus each row's own product.

        Two grouped products compute the second term. With few tokens, all rows are multiplied by
        all adapters at once, and other adapters' columns are set to zero: each adapter is read
        once. Otherwise each row's factors are gathered.
        """
        del dropout_key
        a, b, rows = arrays["a"].astype(x.dtype), arrays["b"].astype(x.dtype), arrays["rows"]
        if x.shape[0] != rows.shape[0]:
            raise ValueError(
                f"the batch has {x.shape[0]} rows, but adapters are bound for {rows.shape[0]} rows"
            )
        count, tokens = a.shape[0], x.size // (x.shape[0] * x.shape[-1])
        flat = x.reshape(x.shape[0], tokens, x.shape[-1])
        if prefer_all_adapters(x.shape[0], tokens, count):
            inner = jnp.einsum("btd,ndr->btnr", flat, a)
            own = jax.nn.one_hot(rows, count, dtype=x.dtype)
            y = jnp.einsum("btnr,bn,nro->bto", inner, own, b)
        else:
            y = jnp.einsum("btr,bro->bto", jnp.einsum("btd,bdr->btr", flat, a[rows]), b[rows])
        return linear(x, base) + y.reshape(*x.shape[:-1], y.shape[-1])

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Any) -> Float[Array, "d_in d_out"]:
        """Raises ValueError, because rows have different kernels."""
        raise ValueError("adapters that are chosen by row cannot be merged; merge one of them")


def prefer_all_adapters(rows: int, tokens: int, adapters: int) -> bool:
    """Returns whether multiplying by all adapters is cheaper than gathering each row's.

    Gathering reads, writes and reads the factors of each row. Multiplying by all reads each adapter
    once, but has as many operations for each token as there are adapters.

    Args:
      rows: Number of rows.
      tokens: Number of tokens of a row.
      adapters: Number of adapters.

    Example:
      >>> prefer_all_adapters(rows=64, tokens=1, adapters=8)
      True
      >>> prefer_all_adapters(rows=64, tokens=512, adapters=8)
      False
    """
    balance = _FLOPS_PER_BYTE.get(target_platform(), _FLOPS_PER_BYTE_OF_ACCELERATORS)
    return adapters * (1 + rows * tokens / balance) < 3 * rows


@struct.dataclass
class StackedAdapters:
    """Adapters over one base, as one array for each factor; a pytree.

    Attributes:
      factors: By path of the kernel, `a` [*stack, adapters, d_in, rank] and `b` [*stack, adapters,
        rank, d_out]. The last adapter is zero, for rows without an adapter.
      names: Names of the adapters; static.
    """

    factors: dict[str, Any]
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def rows(self, names: Sequence[str | None]) -> Int32[np.ndarray, " batch"]:
        """Returns the numbers of adapters by name; None stands for the base alone.

        Raises:
          ValueError: A name is not known.
        """
        for name in names:
            if name is not None and name not in self.names:
                raise ValueError(f"there is no adapter {name!r}{did_you_mean(name, self.names)}")
        numbers: Mapping[str | None, int] = {name: at for at, name in enumerate(self.names)}
        return np.array([numbers.get(name, len(self.names)) for name in names], np.int32)

    def bind(self, params: Tree, rows: Int32[Array | np.ndarray, " batch"]) -> Tree:
        """Returns the parameters with an adapter bound to each row of a batch.

        Other rows or numbers of adapters compile nothing again, if the shapes are the same.

        Args:
          params: Parameters of the base, whose arrays are shared.
          rows: Number of each row's adapter, as `rows` returns them.
        """
        flat = flatten(params)
        factors = flatten(self.factors, is_leaf=lambda _, node: "a" in node)
        for path, arrays in factors.items():
            numbers = jnp.asarray(rows)
            if has_stack(flat[path]):
                numbers = jnp.broadcast_to(numbers, (arrays["a"].shape[0], len(numbers)))
            flat[path] = AdaptedKernel(
                base=flat[path], arrays={**arrays, "rows": numbers}, method=LowRankByRow()
            )
        return unflatten(flat)


def stack_adapters(params: Tree, adapters: Adapters) -> StackedAdapters:
    """Stacks LoRA adapters over one base, so that each row of a batch can use another one.

    Ranks and sets of modules may differ: factors are padded with zeros. This takes memory for each
    adapter as if it had the largest rank and all modules.

    Args:
      params: Parameters of the base.
      adapters: Adapters by name.

    Returns:
      The adapters; `bind` binds one to each row, and `generate` takes them as they are.

    Raises:
      ValueError: An adapter does not fit the base, is not a low-rank product, or trains modules in
        full.

    Example:
      >>> from peft_jax.adapters import AdapterSpec, LoRA
      >>> params = {"mlp": {"kernel": jnp.ones((4, 3))}}
      >>> spec = AdapterSpec(LoRA(rank=2))
      >>> adapters = {"sql": (spec, spec.init(jax.random.key(0), params))}
      >>> stacked = stack_adapters(params, adapters)
      >>> stacked.rows(["sql", None])
      array([0, 1], dtype=int32)
      >>> bound = stacked.bind(params, stacked.rows(["sql", None]))
      >>> bound["mlp"]["kernel"].arrays["a"].shape
      (2, 4, 2)
    """
    if not adapters:
        raise ValueError("there is no adapter to stack; give at least one")
    found: dict[Path, dict[int, tuple[Array, Array]]] = {}
    for number, (name, (spec, state)) in enumerate(
        find_adapters(params, adapters, tuple(adapters)).items()
    ):
        targets = spec.targets(params)
        if not spec.method.merges:
            raise ValueError(
                f"adapter {name!r} has virtual tokens, and rows can differ in adapted modules only"
            )
        if targets.trained:
            saved = ", ".join(sorted({join_path(path[:-1]) for path in targets.trained}))
            raise ValueError(
                f"adapter {name!r} trains {saved} in full, and rows can differ in adapted modules"
                " only"
            )
        reject_experts(name, targets.adapted, "rows cannot differ in them")
        bound = flatten(spec.bind(params, state))
        for path, method in targets.adapted.items():
            if method.maps_tokens:
                raise ValueError(
                    f"adapter {name!r} adapts the embedding {join_path(path[:-1])}, and rows can"
                    " differ in linear maps only"
                )
            read = (
                jax.vmap(method.low_rank_factors)
                if has_stack(bound[path])
                else method.low_rank_factors
            )
            factors = read(bound[path].arrays)
            if factors is None:
                raise ValueError(
                    f"adapter {name!r} has the method {method.name!r}, but rows can differ in"
                    " low-rank products only; convert it with approximate_by_lora"
                )
            found.setdefault(path, {})[number] = factors
    rank = max(a.shape[-1] for own in found.values() for a, _ in own.values())
    stacked = {path: _stack(own, len(adapters), rank) for path, own in found.items()}
    return StackedAdapters(factors=unflatten(stacked), names=tuple(adapters))


def _stack(own: Mapping[int, tuple[Array, Array]], count: int, rank: int) -> dict[str, Array]:
    """Stacks factors before their last two axes, with zeros for adapters without the module."""
    padded = {}
    for number, (a, b) in own.items():
        stack, missing = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-1])
        padded[number] = (
            jnp.pad(a, [*stack, (0, 0), missing]),
            jnp.pad(b, [*stack, missing, (0, 0)]),
        )
    zeros = jax.tree.map(jnp.zeros_like, next(iter(padded.values())))
    columns = [padded.get(number, zeros) for number in range(count + 1)]
    a, b = (jnp.stack(factors, axis=-3) for factors in zip(*columns, strict=True))
    return {"a": a, "b": b}
