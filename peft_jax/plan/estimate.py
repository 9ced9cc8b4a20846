"""Estimates the time of a step from operations, memory reads and collectives."""

import dataclasses
from collections.abc import Sequence

from peft_jax.cost import Chip, Collective
from peft_jax.training.step_flops import StepArithmetic

PRODUCTS = 0.65
"""Assumed share of the peak rate that products reach."""
TRANSFERS = 0.8
"""Assumed share of the peak bandwidth that memory and links reach."""

ASSUMPTIONS = (
    f"products run at {PRODUCTS:.0%} of the vendor's bfloat16 peak",
    f"memory and links run at {TRANSFERS:.0%} of the vendor's bandwidth",
    "a collective uses one torus axis, from both sides",
    "products and transfers overlap, so that the slowest decides",
    "parameters are read once per pass and microbatch; activations are not counted",
)
"""Assumptions of an estimate, for its readers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated seconds of one step.

    Attributes:
      products: Seconds of operations, including rematerialization.
      memory: Seconds of reading parameters.
      links: Seconds of collectives within a slice.
      network: Seconds of collectives between slices.
      utilization: Share of the devices' peak rate that the model's own operations reach.
    """

    products: float
    memory: float
    links: float
    network: float
    utilization: float

    @property
    def seconds(self) -> float:
        """Seconds of a step: the longest part, which the others overlap."""
        return max(self.products, self.memory, self.links, self.network)

    @property
    def bound_by(self) -> str:
        """Name of the longest part."""
        parts = {name: getattr(self, name) for name in ("products", "memory", "links", "network")}
        return max(parts, key=lambda name: parts[name])


def estimate_step(
    chip: Chip,
    *,
    devices: int,
    arithmetic: StepArithmetic,
    parameter_bytes: int,
    collectives: Sequence[Collective],
) -> Estimate:
    """Estimates the time of a step on one kind of chip; see `ASSUMPTIONS`.

    Args:
      chip: Peak rates of the devices.
      devices: Number of devices.
      arithmetic: Operations of a step.
      parameter_bytes: Bytes of parameters that one device reads in a step.
      collectives: Collectives of a step.
    """
    products = arithmetic.computed / devices / (chip.flops * PRODUCTS)
    memory = parameter_bytes / (chip.memory_bandwidth * TRANSFERS)
    within = sum(one.total for one in collectives if not one.between_slices)
    between = sum(one.total for one in collectives if one.between_slices)
    links = within / (chip.link_bandwidth * TRANSFERS)
    network = between / (chip.network_bandwidth * TRANSFERS)
    seconds = max(products, memory, links, network)
    return Estimate(
        products=products,
        memory=memory,
        links=links,
        network=network,
        utilization=arithmetic.total / devices / chip.flops / seconds,
    )
