r"""Fine-tunes a model as a configuration says.

    python train.py --config=configs/finetune.py:hybrid --workdir=runs/gsm8k \
        --config.model.path=/path/to/checkpoint --config.data.recipe=gsm8k

--config names a file of `configs/`, or one of yours; after a colon comes the file's own argument.
Any setting in it can be changed: --config.method.rank=16, --config.train.learning_rate=1e-4.

--plan compiles the training step for devices that need not be there (--topology=v5p:4x4x8) and
says what it takes and whether it fits, and --search looks for the smallest devices on which it
does: docs/planning.md.

--workdir is where everything goes that the run writes. The same command again goes on from the last
checkpoint there, wherever the run was stopped; with more steps, also after its end. A run whose
base or data has changed since it began is refused, unless --allow_changed=base,data says that it
may: docs/resuming.md.

On a pod the same command runs on every host, with --distributed; see docs/pods.md.

Exit codes: 0 finished (or, with --plan, it fits); 1 failed; 2 refused, the message says what would
work; 3 another process is gone; 4 planned, and it does not fit; 143 or 130 stopped by SIGTERM or
Ctrl-C, with a checkpoint to go on from. docs/exit_codes.md has those of all commands.
"""

import contextlib
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from peft_jax.runtime import exits
from peft_jax.training import config_flags

if TYPE_CHECKING:
    from peft_jax.runtime.processes import PeerMonitor

_CONFIG = config_flags.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run works; by default runs/ and the configuration's name."
)
_ALLOW_CHANGED = flags.DEFINE_list(
    "allow_changed",
    [],
    "What may have changed since the run in the work directory began: base, data, or both, with a "
    "comma between.",
)
_TRACEBACK = config_flags.define_traceback()
_PLAN = config_flags.define_plan()

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes that train together, as on a pod: the same command on every host. "
    "On TPU pods, SLURM and Open MPI they find each other; elsewhere give the next three.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of the first process, which all can reach; or JAX_COORDINATOR_ADDRESS.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together; or JAX_NUM_PROCESSES."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0; or JAX_PROCESS_ID."
)
_CONTACT_TIMEOUT = flags.DEFINE_integer(
    "contact_timeout",
    None,
    "Seconds after which a process that is not heard of ends the others; 40 by default.",
)


def main(argv: Sequence[str]) -> int:
    """Runs the configuration of the flags, in the work directory of the flags."""
    given = config_flags.check_config(argv, _CONFIG.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    contact = None if _PLAN.wanted else _join_processes()
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    from peft_jax.training.config import from_config_dict

    if _PLAN.wanted:
        from peft_jax.plan.command import plan_command

        return plan_command(from_config_dict(given), _PLAN)
    from peft_jax.training.loop import run

    with contextlib.nullcontext() if contact is None else _ending_together(contact):
        run(
            from_config_dict(given),
            _WORKDIR.value or _default_workdir(),
            allow_changed=_ALLOW_CHANGED.value,
        )
    return exits.ExitCode.DONE


@contextlib.contextmanager
def _ending_together(contact: "PeerMonitor") -> Iterator[None]:
    """Tells the other processes how this one ends."""
    from peft_jax.runtime.errors import InterruptedRunError

    try:
        yield
    except InterruptedRunError:
        # All processes stop at the same step.
        contact.closing()
        raise
    except Exception as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        ending = exits.explain(error)
        if ending is None:
            contact.fail(error)
        # Where nobody reads what this process says, the others still have to be told.
        with contextlib.suppress(BrokenPipeError):
            config_flags.say(ending.message)
        contact.leave(ending.message, ending.code)
    contact.closing()


def _join_processes() -> "PeerMonitor | None":
    """Connects this process with the others, where there are any."""
    given = {
        "coordinator": _COORDINATOR.value,
        "count": _NUM_PROCESSES.value,
        "index": _PROCESS_ID.value,
    }
    if not _DISTRIBUTED.value and all(value is None for value in given.values()):
        return None
    from peft_jax.runtime.processes import ProcessSettings, join_processes

    settings = ProcessSettings.from_environment(**given, contact_timeout=_CONTACT_TIMEOUT.value)
    return join_processes(settings, say=config_flags.say)


def _default_workdir() -> str:
    """`runs/finetune-lora` for `configs/finetune.py:lora`."""
    path, _, arg = config_flags.config_name().partition(":")
    words = re.findall(r"[\w.]+", arg)
    return str(Path("runs", "-".join([Path(path).stem, *words])))


if __name__ == "__main__":
    config_flags.run("train.py", main)
