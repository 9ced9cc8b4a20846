"""Shards arrays and programs over a mesh of devices.

- [`mesh`][peft_jax.parallel.mesh]: `make_mesh`, `MeshSettings`.
- [`rules`][peft_jax.parallel.rules]: `LogicalAxisRules`, `sharding_tree`, `batch_sharding`.
- [`activation_sharding`][peft_jax.parallel.activation_sharding]: `on_mesh`, the context for
  tracing programs; `constrain`, `over_shards`.
- [`column_products`][peft_jax.parallel.column_products]: `column_products`, of one input with
  several kernels.
- [`integer_rows`][peft_jax.parallel.integer_rows]: `integer_row_product`, of 8-bit integers where a
  device holds some of a kernel's rows.
- [`async_collectives`][peft_jax.parallel.async_collectives]: `async_collective_options`, compiler
  options for transfers behind products.
- [`expert_shards`][peft_jax.parallel.expert_shards]: `mix_experts`, over experts on a mesh.
"""

from peft_jax.parallel.activation_sharding import (
    active_mesh,
    active_rules,
    constrain,
    constrain_features,
    on_mesh,
    over_shards,
    spans,
)
from peft_jax.parallel.async_collectives import async_collective_options
from peft_jax.parallel.column_products import column_products
from peft_jax.parallel.expert_shards import mix_experts
from peft_jax.parallel.integer_rows import integer_row_product
from peft_jax.parallel.mesh import MESH_AXES, MeshSettings, make_mesh
from peft_jax.parallel.rules import (
    LogicalAxisRules,
    batch_sharding,
    check_divides,
    shard_further,
    sharding_tree,
)

__all__ = [
    "MESH_AXES",
    "LogicalAxisRules",
    "MeshSettings",
    "active_mesh",
    "active_rules",
    "async_collective_options",
    "batch_sharding",
    "check_divides",
    "column_products",
    "constrain",
    "constrain_features",
    "integer_row_product",
    "make_mesh",
    "mix_experts",
    "on_mesh",
    "over_shards",
    "shard_further",
    "sharding_tree",
    "spans",
]
