"""What a step costs: operations, memory, communication, and the devices that pay for it.

- [`flops`][peft_jax.cost.flops]: `count_flops` of a program, from its jaxpr.
- [`collectives`][peft_jax.cost.collectives]: `read_collectives` of a compiled program.
- [`memory`][peft_jax.cost.memory]: bytes of arrays, and of a device's memory.
- [`chips`][peft_jax.cost.chips]: `find_chip`, the figures that their makers state.
- [`topology`][peft_jax.cost.topology]: `find_topology`, devices that need not be present.
"""

from peft_jax.cost.chips import Chip, find_chip
from peft_jax.cost.collectives import Collective, read_collectives
from peft_jax.cost.flops import FlopCount, count_flops, count_jaxpr
from peft_jax.cost.topology import TOPOLOGIES, Topology, find_topology

__all__ = [
    "TOPOLOGIES",
    "Chip",
    "Collective",
    "FlopCount",
    "Topology",
    "count_flops",
    "count_jaxpr",
    "find_chip",
    "find_topology",
    "read_collectives",
]
