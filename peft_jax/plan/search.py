"""The smallest devices that a run fits on."""

from peft_jax.parallel import find_topology
from peft_jax.plan.planner import Plan, make_plan
from peft_jax.training.config import RunConfig


def search(config: RunConfig, name: str) -> Plan:
    """To come."""
    return make_plan(config, find_topology(name))
