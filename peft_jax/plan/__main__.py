"""`python -m peft_jax.plan --config=configs/hybrid_405b.py --topology=v5p:4x4x8`."""

from collections.abc import Sequence

from absl import flags, logging

from peft_jax import command_line

_CONFIG = command_line.define_config()
command_line.define_traceback()
_PLAN = command_line.define_plan(always=True)


def main(argv: Sequence[str]) -> int:
    """Plans the configuration of the flags."""
    given = command_line.check_config(argv, _CONFIG.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    from peft_jax.plan.command import plan_command
    from peft_jax.training.config import from_config_dict

    return plan_command(from_config_dict(given), _PLAN)


if __name__ == "__main__":
    command_line.run("peft_jax.plan", main)
