"""Many devices: the mesh they form, and what of each array they hold.

- [`mesh`][peft_jax.parallel.mesh]: `make_mesh`, `MeshSettings`.
- [`activations`][peft_jax.parallel.activations]: `on_mesh`.
- [`rules`][peft_jax.parallel.rules]: `LogicalAxisRules`, `sharding_tree`, `batch_sharding`.
"""

from peft_jax.parallel.activations import on_mesh
from peft_jax.parallel.mesh import MESH_AXES, MeshSettings, make_mesh
from peft_jax.parallel.rules import LogicalAxisRules, batch_sharding, sharding_tree

__all__ = [
    "MESH_AXES",
    "LogicalAxisRules",
    "MeshSettings",
    "batch_sharding",
    "make_mesh",
    "on_mesh",
    "sharding_tree",
]
