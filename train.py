r"""Fine-tunes a model as a configuration says.

    python train.py --config=configs/finetune.py:hybrid --workdir=runs/gsm8k \
        --config.model.path=/path/to/checkpoint --config.data.recipe=gsm8k

--config names a file of `configs/`, or one of yours; after a colon comes the file's own argument.
Any setting in it can be changed: --config.method.rank=16, --config.train.learning_rate=1e-4.

--workdir is where everything goes that the run writes. The same command again goes on from the last
checkpoint there, wherever the run was stopped.

On a pod the same command runs on every host, with --distributed; see docs/pods.md.

Exit codes: 0 finished; 2 refused, nothing was done; 1 failed; 3 another process is gone; 143 or 130
stopped by SIGTERM or Ctrl-C, with a checkpoint to go on from.
"""

import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
    from peft_jax.training.processes import Contact

# Unknown keys are let through here: the conversion refuses them, and names the nearest known one.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A configuration file, and after a colon its argument: configs/finetune.py:lora.",
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run works; by default runs/ and the configuration's name."
)
_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show where in the program a refused run was refused."
)

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

_REFUSED = 2


def main(argv: Sequence[str]) -> None:
    """Runs the configuration of the flags, in the work directory of the flags."""
    if len(argv) > 1:
        _refuse(f"{argv[1]!r} is not a flag; flags begin with two dashes")
    if _CONFIG.value is None:
        _refuse("--config is missing, for example --config=configs/finetune.py:hybrid; see --help")
    path, _, _ = _config_name().partition(":")
    if not Path(path).is_file():
        _refuse(f"there is no configuration file {path}")
    if not isinstance(_CONFIG.value, ConfigDict):
        _refuse(f"{_config_name()}: get_config must return a ConfigDict")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    contact = _join_processes()
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    from peft_jax.training.config import from_config_dict
    from peft_jax.training.errors import InterruptedRunError, NonFiniteError, RefusedError
    from peft_jax.training.loop import run

    try:
        try:
            config = from_config_dict(_CONFIG.value)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        run(config, Path(_WORKDIR.value or _default_workdir()))
    except (RefusedError, NonFiniteError) as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        if contact is not None:
            _say(str(error))
            contact.leave(str(error), error.exit_code)
        _leave(str(error), error.exit_code)
    except InterruptedRunError as error:
        # All processes stop at the same step.
        if contact is not None:
            contact.closing()
        _leave(str(error), error.exit_code)
    except Exception as error:
        if contact is None:
            raise
        traceback.print_exc()
        contact.fail(error)
    if contact is not None:
        contact.closing()


def _join_processes() -> "Contact | None":
    """Connects this process with the others, where there are any."""
    given = {
        "coordinator": _COORDINATOR.value,
        "count": _NUM_PROCESSES.value,
        "index": _PROCESS_ID.value,
    }
    if not _DISTRIBUTED.value and all(value is None for value in given.values()):
        return None
    from peft_jax.training.errors import RefusedError
    from peft_jax.training.processes import ProcessSettings, join_processes

    try:
        settings = ProcessSettings.from_environment(**given, contact_timeout=_CONTACT_TIMEOUT.value)
        return join_processes(settings, say=_say)
    except (ValueError, RefusedError) as error:
        _refuse(str(error))


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Absl's parsing, with whatever is wrong with the flags or the configuration in one message."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        # A configuration is a program and may raise anything.
        if "--traceback" in argv:
            traceback.print_exc()
        _refuse(_explain(error))


def _explain(error: Exception) -> str:
    """What is wrong, without the traceback that ml_collections puts into its messages."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    head, found, trace = text.partition("Error whilst parsing config file:")
    if found:
        lines = [line for line in trace.splitlines() if line.strip()]
        text = f"{head}{re.sub(r'^(builtins[.])?ValueError: ', '', lines[-1].strip())}"
    elif missing := re.search(r"Failed loading config file(?s:.*)directory: '(.*)'", text):
        text = f"there is no configuration file {missing[1]}"
    elif isinstance(error, SyntaxError):
        text = f"{error.filename}:{error.lineno}: {error.msg}"
    elif not isinstance(error, (flags.Error, KeyError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text.strip()


def _config_name() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _default_workdir() -> str:
    """`runs/finetune-lora` for `configs/finetune.py:lora`."""
    path, _, arg = _config_name().partition(":")
    words = re.findall(r"[\w.]+", arg)
    return str(Path("runs", "-".join([Path(path).stem, *words])))


def _refuse(message: str) -> NoReturn:
    _leave(message, _REFUSED)


def _leave(message: str, code: int) -> NoReturn:
    _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    print(f"train.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
