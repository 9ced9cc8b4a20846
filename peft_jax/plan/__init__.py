"""What a run will take, before there is anything to run it on.

    python train.py --config=configs/hybrid_405b.py --plan --topology=v5p:4x4x8
    python -m peft_jax.plan --config=configs/hybrid_405b.py --topology=v5p:4x4x8 --json

- [`planner`][peft_jax.plan.planner]: `make_plan`, which compiles the step of a run.
- [`memory`][peft_jax.plan.step_memory]: what a device holds, by kind.
- [`estimate`][peft_jax.plan.estimate]: how long a step takes, and on what assumptions.
- [`search`][peft_jax.plan.search]: the smallest topology, and the mesh on it.
- [`text`][peft_jax.plan.text]: a plan in words.
"""

from peft_jax.plan.planner import Plan, make_plan
from peft_jax.plan.search import search
from peft_jax.plan.text import describe

__all__ = ["Plan", "describe", "make_plan", "search"]
