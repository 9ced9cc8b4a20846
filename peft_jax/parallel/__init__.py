"""Many devices: the mesh they form, and what of each array they hold.

- [`mesh`][peft_jax.parallel.mesh]: `make_mesh`, `MeshSettings`.
- [`rules`][peft_jax.parallel.rules]: `LogicalAxisRules`, `sharding_tree`, `batch_sharding`.
- [`activations`][peft_jax.parallel.activations]: `constrain`, `over_shards`.
- [`running`][peft_jax.parallel.running]: `on_mesh`, within which programs are traced.
- [`topology`][peft_jax.parallel.topology]: `find_topology`, devices that need not be there.
- [`chips`][peft_jax.parallel.chips]: `find_chip`, what their makers state.
- [`arithmetic`][peft_jax.parallel.arithmetic]: `count_arithmetic` of a program.
- [`collectives`][peft_jax.parallel.collectives]: `read_collectives` of a compiled program.
"""

from peft_jax.parallel.activations import (
    active_mesh,
    constrain,
    constrain_features,
    over_shards,
    spans,
)
from peft_jax.parallel.arithmetic import Count, count_arithmetic, count_jaxpr
from peft_jax.parallel.chips import Chip, find_chip
from peft_jax.parallel.collectives import Collective, read_collectives
from peft_jax.parallel.mesh import MESH_AXES, MeshSettings, make_mesh
from peft_jax.parallel.rules import (
    LogicalAxisRules,
    batch_sharding,
    check_divides,
    cut_further,
    sharding_tree,
)
from peft_jax.parallel.running import on_mesh
from peft_jax.parallel.topology import TOPOLOGIES, Topology, find_topology

__all__ = [
    "MESH_AXES",
    "TOPOLOGIES",
    "Chip",
    "Collective",
    "Count",
    "LogicalAxisRules",
    "MeshSettings",
    "Topology",
    "active_mesh",
    "batch_sharding",
    "check_divides",
    "constrain",
    "constrain_features",
    "count_arithmetic",
    "count_jaxpr",
    "cut_further",
    "find_chip",
    "find_topology",
    "make_mesh",
    "on_mesh",
    "over_shards",
    "read_collectives",
    "sharding_tree",
    "spans",
]
