"""Estimates a step's cost: floating-point operations, memory and communication.

- [`flops`][peft_jax.cost.flops]: `count_flops` of a program, from its jaxpr.
- [`collectives`][peft_jax.cost.collectives]: `read_collectives` of a compiled program.
- [`memory`][peft_jax.cost.memory]: bytes of arrays and of device memory.
- [`chips`][peft_jax.cost.chips]: `find_chip`, peak rates from vendors' data sheets.
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
