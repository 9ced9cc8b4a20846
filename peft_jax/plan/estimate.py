"""Estimates the time of a step from its compiled program."""

import dataclasses
from typing import Any

from peft_jax.cost import Timeline
from peft_jax.cost.timeline import ELEMENTWISE, LINKS, MEMORY, PRODUCTS

ASSUMPTIONS = (
    f"large products run at {PRODUCTS:.0%} of the vendor's peak, others as their shape fills the"
    " matrix units",
    f"memory and links run at {MEMORY:.0%} and {LINKS:.0%} of the vendor's bandwidth, elementwise"
    f" work at {ELEMENTWISE:.0%} of the vector units'",
    "an instruction takes the time of its slowest part, and instructions run one after the other",
    "an asynchronous transfer is hidden by what runs between its start and its end",
    "links run as long as a collective's way on the torus needs",
)
"""Assumptions of an estimate, for its readers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated time of one step.

    Attributes:
      timeline: Seconds by kind of work and by part of the model.
      utilization: Share of the devices' peak rate that the model's own operations reach.
    """

    timeline: Timeline
    utilization: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.timeline.total

    @property
    def bound_by(self) -> str:
        """Kind of work that takes the most time."""
        kinds = self.timeline.by_kind()
        return max(kinds, key=lambda kind: kinds[kind])

    def to_mapping(self) -> dict[str, Any]:
        """Returns the estimate as nested dictionaries of JSON values, in seconds."""
        timeline = self.timeline
        return {
            "seconds": self.seconds,
            "utilization": self.utilization,
            "bound_by": self.bound_by,
            "by_kind": timeline.by_kind(),
            "by_part": timeline.by_part(),
            "transfers_hidden": timeline.hidden(),
            "transfers_not_hidden": timeline.unhidden(),
            "loops_of_unknown_length": list(timeline.unknown_loops),
        }
