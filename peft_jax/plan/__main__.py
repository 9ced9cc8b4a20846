"""`python -m peft_jax.plan --config=configs/hybrid_405b.py --topology=v5p:4x4x8`."""

import traceback
from collections.abc import Sequence

from absl import app, flags, logging

from peft_jax import command_line

_CONFIG = command_line.define_config()
_TRACEBACK = command_line.define_traceback()
_PLAN = command_line.define_plan(always=True)


def main(argv: Sequence[str]) -> None:
    """Plans the configuration of the flags."""
    given = command_line.check_config(argv, _CONFIG.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    from peft_jax.plan.command import plan_command
    from peft_jax.training.config import from_config_dict
    from peft_jax.training.errors import RefusedError

    try:
        try:
            config = from_config_dict(given)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        raise SystemExit(plan_command(config, _PLAN))
    except RefusedError as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        command_line.leave(str(error), error.exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
