"""Estimates a step's cost: floating-point operations, memory and communication.

- [`flops`][peft_jax.cost.flops]: `count_flops` of a program, from its jaxpr.
- [`hlo`][peft_jax.cost.hlo]: `read_program`, a compiled program from its text.
- [`timeline`][peft_jax.cost.timeline]: `estimate_program`, the time of a compiled program, from
  [`loops`][peft_jax.cost.loops], how often its parts run;
  [`products`][peft_jax.cost.products] and [`kernels`][peft_jax.cost.kernels];
  [`traffic`][peft_jax.cost.traffic] of the memory; [`collectives`][peft_jax.cost.collectives] and
  the [`links`][peft_jax.cost.links] that they take; and [`parts`][peft_jax.cost.parts] of the
  model.
- [`saved`][peft_jax.cost.saved]: what a step keeps of its forward pass, and where.
- [`memory`][peft_jax.cost.memory]: bytes of arrays and of device memory.
- [`chips`][peft_jax.cost.chips]: `find_chip`, peak rates from vendors' data sheets.
- [`topology`][peft_jax.cost.topology]: `find_topology`, devices that need not be present.
"""

from peft_jax.cost.chips import Chip, find_chip
from peft_jax.cost.collectives import Collective
from peft_jax.cost.flops import FlopCount, count_flops, count_jaxpr
from peft_jax.cost.hlo import Program, read_program
from peft_jax.cost.links import Network, network_of
from peft_jax.cost.timeline import Timeline, estimate_program
from peft_jax.cost.topology import TOPOLOGIES, Topology, find_topology

__all__ = [
    "TOPOLOGIES",
    "Chip",
    "Collective",
    "FlopCount",
    "Network",
    "Program",
    "Timeline",
    "Topology",
    "count_flops",
    "count_jaxpr",
    "estimate_program",
    "find_chip",
    "find_topology",
    "network_of",
    "read_program",
]
