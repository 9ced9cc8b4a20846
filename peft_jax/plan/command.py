"""The command that plans, for whichever program has parsed its flags."""

import json
import sys

import jax

from peft_jax.cost import find_topology
from peft_jax.cost.topology import HERE, has_tpu, skip_tpu_discovery
from peft_jax.plan.planner import make_plan
from peft_jax.plan.search import search
from peft_jax.plan.text import describe
from peft_jax.runtime.errors import ExitCode, RefusedError
from peft_jax.training.config import RunConfig
from peft_jax.training.config_flags import PlanFlags


def plan_command(config: RunConfig, flags: PlanFlags) -> int:
    """Plans, prints the plan, and returns the exit code.

    Raises:
      RefusedError: the configuration cannot be planned.
      ValueError: there is no such topology.
    """
    name = flags.topology or _platform_here()
    if name not in HERE:
        # The TPU that this may be started on is not needed, and is not to be taken.
        jax.config.update("jax_platforms", "cpu")
    if flags.search:
        plan, layout = search(config, name, say=_say)
        if layout is not None:
            _say(f"laid out by {layout.flags()}")
    else:
        plan = make_plan(config, find_topology(name))
    print(json.dumps(plan.to_mapping(), indent=2) if flags.json else describe(plan))
    return ExitCode.DONE if plan.fits else ExitCode.DOES_NOT_FIT


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _platform_here() -> str:
    if not has_tpu():
        skip_tpu_discovery()
    platform = jax.default_backend()
    if platform not in HERE:
        raise RefusedError(
            f"say which devices to plan for: --topology=v5p:4x4x8, for example (those of this "
            f"machine are of the kind {platform!r}, which goes by the name of its topology)"
        )
    return platform
