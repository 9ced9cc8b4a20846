r"""Fine-tunes a model as a configuration says.

    peft-jax train --config=finetune.py:hybrid --workdir=runs/gsm8k \
        --config.model.path=/path/to/checkpoint --config.data.recipe=gsm8k

`python train.py` does the same from the repository. --config names a file of
yours, or one that comes with peft_jax; after a colon comes the file's own
argument. Any setting in it can be changed: --config.method.rank=16,
--config.train.learning_rate=1e-4.

--workdir is the folder for everything the run writes, on disk or in a bucket
(gs://, s3://). The same command again resumes from the latest checkpoint there,
wherever the run was stopped; with more steps, also after its end. A run whose
base or data has changed since it began is rejected, unless
--allow_changed=base,data permits it: docs/resuming.md.

--plan compiles the training step for devices that need not be present, and
reports its memory, its time, and whether it fits. --search finds the smallest
topology on which it fits: docs/planning.md.

On a pod the same command runs on every host, with --distributed:
docs/pods.md.

Exit codes: 0 finished (or, with --plan, it fits); 1 failed; 2 rejected, the
message says what would work; 3 another process is gone; 4 planned, and it does
not fit; 143 or 130 stopped by SIGTERM or Ctrl-C, with a checkpoint to resume
from. docs/exit_codes.md has those of all commands.
"""

import argparse
import contextlib
import functools
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_jax.commands.config_flags import ConfigArguments
from peft_jax.commands.plan import add_plan_flags, plan_given
from peft_jax.runtime import exits
from peft_jax.runtime.errors import InterruptedRunError, RefusedError

if TYPE_CHECKING:
    from peft_jax.runtime.processes import PeerMonitor

NAME = "train.py"


@exits.command(NAME)
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or plans, and returns the exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = make_parser().parse_args(argv)
    if _plans(given):
        return plan_given(given)
    peers = _join_processes(given)
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from peft_jax.training.config import from_config_dict
    from peft_jax.training.loop import run

    with (
        contextlib.nullcontext()
        if peers is None
        else ending_together(peers, show_traceback=given.traceback)
    ):
        run(
            from_config_dict(given.config.values),
            given.workdir or _default_workdir(given.config.name),
            allow_changed=given.allow_changed,
        )
    return exits.ExitCode.DONE


@contextlib.contextmanager
def ending_together(peers: "PeerMonitor", *, show_traceback: bool = False) -> Iterator[None]:
    """Tells the other processes how this one ends."""
    try:
        yield
    except InterruptedRunError:
        # All processes stop at the same step.
        peers.closing()
        raise
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        ending = exits.explain(error)
        if ending is None:
            peers.fail(error)
        # The other processes must be told even if this one's standard error is closed.
        with contextlib.suppress(BrokenPipeError):
            exits.say(ending.message, name=NAME)
        peers.leave(ending.message, ending.code)
    peers.closing()


def make_parser() -> ConfigArguments:
    """Returns the parser of the command's flags."""
    parser = ConfigArguments(NAME, description=__doc__)
    add = parser.add_argument_group("the run").add_argument
    add(
        "--workdir",
        help="folder of the run, or gs:// or s3://; by default runs/ and the configuration's name",
    )
    add(
        "--allow_changed",
        type=_words,
        default=[],
        metavar="WHAT",
        help="sources that may have changed since the run in the work directory began: base, data,"
        " or both, separated by a comma",
    )
    plan = parser.add_argument_group("planning")
    plan.add_argument(
        "--plan",
        action="store_true",
        help="compile the training step and report its memory and time; nothing is run",
    )
    add_plan_flags(plan)
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--distributed",
        action="store_true",
        help="train with several processes, as on a pod: run the same command on every host; on"
        " TPU pods, SLURM and Open MPI they find each other, elsewhere give the next three flags",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of the first process, reachable from all; by default JAX_COORDINATOR_ADDRESS",
    )
    add(
        "--num_processes",
        type=int,
        help="number of processes; by default JAX_NUM_PROCESSES",
    )
    add(
        "--process_id",
        type=int,
        help="index of this process, from 0; by default JAX_PROCESS_ID",
    )
    add(
        "--contact_timeout",
        type=int,
        metavar="SECONDS",
        help="time after which an unresponsive process ends the others (default: 40)",
    )
    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _plans(given: argparse.Namespace) -> bool:
    """Returns whether the command line asks for a plan instead of a run.

    Raises:
      RefusedError: Flags of planning are given without --plan or --search, so that a run would
        start unintentionally.
    """
    if given.plan or given.search:
        return True
    alone = [f"--{name}" for name in ("topology", "json") if getattr(given, name)]
    if alone:
        raise RefusedError(
            f"{' and '.join(alone)} need --plan or --search, neither of which is given; add one of"
            " them, or omit these flags to train"
        )
    return False


def _join_processes(given: argparse.Namespace) -> "PeerMonitor | None":
    """Connects this process with the others, if there are any."""
    flags = {
        "coordinator": given.coordinator,
        "count": given.num_processes,
        "index": given.process_id,
    }
    if not given.distributed and all(value is None for value in flags.values()):
        return None
    from peft_jax.runtime.processes import ProcessSettings, join_processes

    settings = ProcessSettings.from_environment(**flags, contact_timeout=given.contact_timeout)
    return join_processes(settings, say=functools.partial(exits.say, name=NAME))


def _default_workdir(name: str) -> str:
    """Returns `runs/finetune-lora` for `configs/finetune.py:lora`."""
    path, _, argument = name.partition(":")
    words = re.findall(r"[\w.]+", argument)
    return str(Path("runs", "-".join([Path(path).stem, *words])))


if __name__ == "__main__":
    sys.exit(main())
