r"""Fine-tunes a model as a configuration says.

    python train.py --config=configs/finetune.py:hybrid --workdir=runs/gsm8k \
        --config.model.path=/path/to/checkpoint --config.data.recipe=gsm8k

--config names a file of `configs/`, or one of yours; after a colon comes the file's own argument.
Any setting in it can be changed: --config.method.rank=16, --config.train.learning_rate=1e-4.

--plan compiles the training step for devices that need not be there (--topology=v5p:4x4x8) and
says what it takes and whether it fits, and --search looks for the smallest devices on which it
does: docs/planning.md.

--workdir is where everything goes that the run writes. The same command again goes on from the last
checkpoint there, wherever the run was stopped.

Exit codes: 0 finished (or, with --plan, it fits); 2 refused, nothing was done; 4 planned, and it
does not fit; 1 failed; 143 or 130 stopped by SIGTERM or Ctrl-C, with a checkpoint to go on from.
"""

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from peft_jax import command_line

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run works; by default runs/ and the configuration's name."
)
_TRACEBACK = command_line.define_traceback()
_PLAN = command_line.define_plan()

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes that train together, as on a pod: the same command on every host. "
    "On TPU pods, SLURM and Open MPI they find each other; elsewhere set JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)


def main(argv: Sequence[str]) -> None:
    """Runs the configuration of the flags, in the work directory of the flags."""
    given = command_line.check_config(argv, _CONFIG.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if _DISTRIBUTED.value and not _PLAN.wanted:
        _join_processes()
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    from peft_jax.training.config import from_config_dict
    from peft_jax.training.errors import InterruptedRunError, NonFiniteError, RefusedError
    from peft_jax.training.loop import run

    try:
        try:
            config = from_config_dict(given)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        if _PLAN.wanted:
            from peft_jax.plan.command import plan_command

            raise SystemExit(plan_command(config, _PLAN))
        run(config, Path(_WORKDIR.value or _default_workdir()))
    except (RefusedError, NonFiniteError, InterruptedRunError) as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        command_line.leave(str(error), error.exit_code)


def _join_processes() -> None:
    """Connects this process with the others; nothing of JAX may have been used before."""
    import jax

    numbers = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    count, index = (None if number is None else int(number) for number in numbers)
    jax.distributed.initialize(num_processes=count, process_id=index)


def _default_workdir() -> str:
    """`runs/finetune-lora` for `configs/finetune.py:lora`."""
    path, _, arg = command_line.config_name().partition(":")
    words = re.findall(r"[\w.]+", arg)
    return str(Path("runs", "-".join([Path(path).stem, *words])))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
