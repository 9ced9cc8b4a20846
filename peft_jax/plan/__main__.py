"""`python -m peft_jax.plan --config=configs/hybrid_405b.py --topology=v5p:4x4x8`."""

from collections.abc import Sequence

from absl import flags, logging

from peft_jax.training import config_flags

_CONFIG = config_flags.define_config()
config_flags.define_traceback()
_PLAN = config_flags.define_plan(always=True)


def main(argv: Sequence[str]) -> int:
    """Plans the configuration of the flags."""
    given = config_flags.check_config(argv, _CONFIG.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    from peft_jax.plan.command import plan_command
    from peft_jax.training.config import from_config_dict

    return plan_command(from_config_dict(given), _PLAN)


if __name__ == "__main__":
    config_flags.run("peft_jax.plan", main)
