"""The command line of a configuration: --config, and any setting in it as a flag."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from peft_jax.runtime import exits


def define_config() -> Any:
    """Defines --config, and returns its holder.

    Unknown keys are let through: the conversion refuses them, and names the nearest known one.
    """
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "A configuration file, and after a colon its argument: configs/finetune.py:lora.",
        lock_config=False,
        accept_new_attributes=True,
    )


def define_traceback() -> Any:
    """Defines --traceback, and returns its holder."""
    return flags.DEFINE_bool(
        "traceback", False, "Show where in the program a refused run was refused."
    )


class PlanFlags:
    """The flags of planning, as they are given on the command line.

    Args:
      always: whether the command does nothing but plan.
    """

    def __init__(self, *, always: bool):
        self._plan = None
        if not always:
            self._plan = flags.DEFINE_bool(
                "plan", False, "Compile the training step and say what it takes; nothing is run."
            )
        self._search = flags.DEFINE_bool(
            "search",
            False,
            "Plan on ever larger topologies of the kind that --topology names, until it fits.",
        )
        self._topology = flags.DEFINE_string(
            "topology",
            "",
            "The devices to plan for: v5p:4x4x8, v5e:16x16*2 (two slices), or cpu or gpu for those "
            "of this machine, which is the default; with --search a kind of TPU alone, v5p.",
        )
        self._json = flags.DEFINE_bool("json", False, "Print the plan as JSON.")

    @property
    def wanted(self) -> bool:
        """Whether something is to be planned, and nothing run.

        A command that says what to plan for, or how to print it, but not to plan, is refused: what
        it asks for is not the run that would begin.
        """
        if self._plan is None or self._plan.value or self._search.value:
            return True
        alone = [f"--{one.name}" for one in (self._topology, self._json) if one.value]
        if alone:
            refuse(
                f"{' and '.join(alone)} only plan, and neither --plan nor --search is given; add"
                " one of them, or, to train, leave these out"
            )
        return False

    @property
    def search(self) -> bool:
        """Whether to look for the smallest topology."""
        return self._search.value

    @property
    def topology(self) -> str:
        """The devices."""
        return self._topology.value

    @property
    def json(self) -> bool:
        """Whether to print JSON."""
        return self._json.value


def define_plan(*, always: bool = False) -> PlanFlags:
    """Defines the flags of planning."""
    return PlanFlags(always=always)


def run(name: str, main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command of Absl's flags, and ends the program with its exit code.

    Args:
      name: the command's name, which messages begin with.
      main: what is done once the flags are parsed; given what is left of the command line.
    """

    @exits.command(name)
    def guarded() -> None:
        app.run(main, flags_parser=parse)

    sys.exit(guarded())


def parse(argv: Sequence[str]) -> list[str]:
    """Absl's parsing, with whatever is wrong with the flags or the configuration in one message."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        # A configuration is a program and may raise anything.
        if "--traceback" in argv:
            traceback.print_exc()
        refuse(explain_config_error(error))


def check_config(argv: Sequence[str], config: Any) -> ConfigDict:
    """The configuration that the flags have put together.

    Args:
      argv: what is left of the command line.
      config: the value of --config.
    """
    if len(argv) > 1:
        refuse(f"{argv[1]!r} is not a flag; flags begin with two dashes")
    if config is None:
        refuse("--config is missing, for example --config=configs/finetune.py:hybrid; see --help")
    path, _, _ = config_name().partition(":")
    if not Path(path).is_file():
        refuse(f"there is no configuration file {path}")
    if not isinstance(config, ConfigDict):
        refuse(f"{config_name()}: get_config must return a ConfigDict")
    # Imported here, so that a mistyped flag is refused before JAX is imported.
    from peft_jax.training.config import let_flags_win

    let_flags_win(config, config_flags.get_override_values(flags.FLAGS["config"]))
    return config


def config_name() -> str:
    """The configuration's file and argument, as given."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def refuse(message: str) -> NoReturn:
    """Ends the program, with nothing done."""
    say(message)
    sys.exit(exits.ExitCode.REFUSED)


def say(message: str) -> None:
    """Tells the user, in the program's name."""
    # What is started as `python -m package` has a file of no telling name.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = Path(sys.argv[0]).name if spec is None else spec.name.removesuffix(".__main__")
    exits.say(message, name=name)


def _setting_of_flag(name: str) -> str:
    """The setting that a flag was probably meant to change, which --config. has to come before."""
    if flags.FLAGS["config"].flag_type() != "config object":
        return ""
    from peft_jax.training.config import default_config
    from peft_jax.training.setting_aliases import settings_called

    meant = settings_called(name.rpartition(".")[2], default_config().to_dict())
    flags_meant = [one if one.startswith("--") else f"--config.{one}" for one in meant[:3]]
    return f"; did you mean {' or '.join(flags_meant)}?" if flags_meant else ""


def explain_config_error(error: Exception) -> str:
    """Returns what is wrong with a configuration, without ml_collections' own tracebacks."""
    if isinstance(error, flags.UnrecognizedFlagError) and "config" in flags.FLAGS:
        return f"{error}{_setting_of_flag(error.flagname)}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    head, found, trace = text.partition("Error whilst parsing config file:")
    if found:
        lines = [line for line in trace.splitlines() if line.strip()]
        text = f"{head}{re.sub(r'^(builtins[.])?ValueError: ', '', lines[-1].strip())}"
    elif missing := re.search(r"Failed loading config file(?s:.*)directory: '(.*)'", text):
        text = f"there is no configuration file {missing[1]}"
    elif "has no attribute 'get_config'" in text:
        given = next((word for word in sys.argv if word.startswith("--config=")), "--config")
        text = f"{given} has no get_config(); configs/finetune.py is one to copy"
    elif isinstance(error, SyntaxError):
        text = f"{error.filename}:{error.lineno}: {error.msg}"
    elif not isinstance(error, (flags.Error, KeyError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text.strip()
