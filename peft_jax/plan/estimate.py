"""How long a step will take: three times, and the assumptions they stand on."""

import dataclasses
from collections.abc import Sequence

from peft_jax.cost import Chip, Collective
from peft_jax.training.step_flops import StepArithmetic

PRODUCTS = 0.65
"""The share of a chip's peak that its products reach."""
TRANSFERS = 0.8
"""The share of their bandwidth that memory and links reach."""

ASSUMPTIONS = (
    f"products run at {PRODUCTS:.0%} of the peak that the maker states for bfloat16",
    f"memory and links at {TRANSFERS:.0%} of what the maker states",
    "a collective uses one axis of the torus, from both sides",
    "transfers are hidden behind products, so that the slowest of them decides",
    "parameters are read from memory once a pass and microbatch; activations are not counted",
)
"""What an estimate stands on, for whoever reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step.

    Attributes:
      products: for the arithmetic, what is computed again included.
      memory: for reading the parameters.
      links: for collectives within a slice.
      network: for collectives between slices.
      utilization: the share of the devices' peak that the model's own arithmetic makes of a step of
        `seconds`.
    """

    products: float
    memory: float
    links: float
    network: float
    utilization: float

    @property
    def seconds(self) -> float:
        """The longest of them: the others happen meanwhile."""
        return max(self.products, self.memory, self.links, self.network)

    @property
    def bound_by(self) -> str:
        """Which of them is the longest."""
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
    """The estimate for one kind of chip; see `ASSUMPTIONS`.

    Args:
      chip: the devices.
      devices: how many.
      arithmetic: of a step.
      parameter_bytes: what one device reads of the parameters in a step.
      collectives: of a step.
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
