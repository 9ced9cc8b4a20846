"""Plans a run's memory and time, on devices that need not be present.

    python train.py --config=configs/hybrid_405b.py --plan --topology=v5p:4x4x8
    python -m peft_jax.plan --config=configs/hybrid_405b.py --topology=v5p:4x4x8 --json

- [`planner`][peft_jax.plan.planner]: `make_plan`, which compiles the step of a run.
- [`step_memory`][peft_jax.plan.step_memory]: memory of a device by kind.
- [`estimate`][peft_jax.plan.estimate]: time of a step, and its assumptions.
- [`search`][peft_jax.plan.search]: the smallest topology, and the best layout on it.
- [`text`][peft_jax.plan.text]: a plan as text.
"""

from peft_jax.plan.planner import Plan, make_plan
from peft_jax.plan.search import search
from peft_jax.plan.text import describe

__all__ = ["Plan", "describe", "make_plan", "search"]
