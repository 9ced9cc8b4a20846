"""Parses command lines with a configuration: --config, and any setting in it as a flag."""

import argparse
import dataclasses
import difflib
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import peft_jax
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.flags import Arguments

_OF_CONFIG = re.compile(r"--(no)?config(\.|=|$)")


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """Configuration of a command line.

    Attributes:
      name: File and argument of the configuration, as given.
      values: Configuration that the file returns, with the flags applied.
    """

    name: str
    values: ConfigDict


class ConfigArguments(Arguments):
    """Parser of a command line whose namespace has a `GivenConfig` as `config`.

    ml_collections parses words that begin with --config, and argparse all others. Flags are checked
    before the configuration, which imports JAX, is loaded.

    Args:
      name: Name of the command.
      description: Text of --help.
    """

    def __init__(self, name: str, *, description: str | None):
        super().__init__(name, description=description)
        add = self.add_argument_group("configuration").add_argument
        add(
            "--config",
            metavar="FILE[:ARGUMENT]",
            help="configuration file, with its argument after a colon: finetune.py:lora; a file"
            " that does not exist is looked up among those of peft_jax",
        )
        add(
            "--config.SECTION.SETTING",
            metavar="VALUE",
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="change any setting: --config.train.steps=100; `peft-jax settings` lists them"
            " with their defaults",
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parses the flags and loads the configuration.

        Raises:
          RefusedError: The configuration cannot be loaded, or the value of a setting is invalid.
        """
        words = sys.argv[1:] if args is None else list(args)
        of_config, others = split(words)
        given = super().parse_args(others, namespace)
        try:
            given.config = load_config(of_config)
        except RefusedError:
            raise
        except Exception as error:
            # A configuration is a program and may raise anything.
            check_setting_paths(of_config)
            if given.traceback:
                traceback.print_exc()
            name = f"--config={_take_name(of_config)[0]}"
            raise RefusedError(explain_config_error(error, name)) from error
        return given

    def near(self, flag: str) -> Iterable[str]:
        """Returns the flags or settings that a user may have meant."""
        return settings_near(flag.lstrip("-")) or super().near(flag)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the words about the configuration and the others.

    Args:
      words: Command line without the program's name.

    Example:
      >>> split(["--config", "mine.py", "--workdir=runs/a", "--config.train.steps=3"])
      (['--config=mine.py', '--config.train.steps=3'], ['--workdir=runs/a'])
    """
    of_config: list[str] = []
    others: list[str] = []
    takes_value = False
    for word in words:
        if _OF_CONFIG.match(word):
            of_config.append(word)
            takes_value = "=" not in word and not word.startswith("--no")
        elif takes_value and not word.startswith("--"):
            of_config[-1] += f"={word}"
            takes_value = False
        else:
            others.append(word)
            takes_value = False
    return of_config, others


def load_config(words: Sequence[str]) -> GivenConfig:
    """Loads the configuration that --config names, and applies the --config.… flags.

    Unknown keys are accepted here. The conversion to a `RunConfig` rejects them, and suggests the
    nearest known one.

    Args:
      words: Words about the configuration, from `split`.

    Raises:
      RefusedError: There is no configuration, or it is not one of a run.
    """
    name, words = _take_name(words)
    path, colon, argument = name.partition(":")
    file = f"{find_config_file(path)}{colon}{argument}"
    given = [f"--config={file}", *words]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=given,
    )
    values(["", *given])
    config = values["config"].value
    if not isinstance(config, ConfigDict):
        # ml_collections keeps an error of reading the file until its settings are used.
        error = getattr(config, "_error", None)
        if isinstance(error, OSError):
            raise error
        raise RefusedError(
            f"{name}: get_config returns {type(config).__name__} but must return a ConfigDict"
        )
    let_flags_win(config, config_flags.get_override_values(values["config"]))
    return GivenConfig(name=name, values=config)


ALTERNATIVES = (
    ("train.steps", "train.epochs"),
    ("optimizer.schedule.warmup_steps", "optimizer.schedule.warmup_ratio"),
    ("data.hold_out", "data.eval_path"),
    ("data.hold_out", "data.eval_split"),
)
"""Pairs of settings of which one may be given."""


def let_flags_win(config: ConfigDict, flags: Collection[str]) -> None:
    """Resets what a configuration file sets where a flag sets its alternative.

    A file that sets `train.steps` gives a default. With `--config.train.epochs=2` the user wants
    epochs, and should not have to take the file's steps back as well. Where two flags, or two lines
    of a file, give both alternatives, both stay, and the conversion rejects them.

    Args:
      config: Settings of the file and the flags; modified in place.
      flags: Dotted names of the settings that flags have set.

    Example:
      >>> from peft_jax.training import default_config
      >>> config = default_config()
      >>> config.train.steps, config.train.epochs = 1000, 2
      >>> let_flags_win(config, ["train.epochs"])
      >>> config.train.steps is None, config.train.epochs
      (True, 2)
    """
    from peft_jax.training.config import default_config

    defaults = default_config()
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if name in flags and other not in flags and _value(config, name):
                section, _, key = other.rpartition(".")
                if _value(config, other) is not None:
                    _value(config, section)[key] = _value(defaults, other)


def _value(config: ConfigDict, name: str) -> Any:
    """Returns the value at a dotted name; None if a section is missing."""
    for part in name.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return None
        config = config[part]
    return config


def check_setting_paths(words: Sequence[str]) -> None:
    """Raises RefusedError if a --config.… flag names a section that does not exist.

    ml_collections raises a bare KeyError or TypeError for it.

    Args:
      words: Words about the configuration, from `split`.

    Raises:
      RefusedError: A section is missing, or is a setting; the message names the nearest ones.
    """
    # Imported here, so that a mistyped flag is rejected before JAX is imported.
    from peft_jax.core import did_you_mean
    from peft_jax.training.config import default_config

    for word in words:
        flag = word.partition("=")[0]
        path = re.sub(r"^--(no)?config\.?", "", flag)
        if flag == "--config":
            continue
        *sections, setting = path.split(".")
        if not all([*sections, setting]):
            raise RefusedError(
                f"{flag} names no setting; write --config.SECTION.SETTING=VALUE, for example"
                " --config.train.steps=100"
            )
        found: Any = default_config().to_dict()
        for depth, name in enumerate(sections):
            above = ".".join(sections[:depth])
            if name not in found:
                inside = f" in {above}" if above else ""
                known = [key for key, value in found.items() if isinstance(value, dict)]
                meant = " or ".join(settings_near(setting))
                hint = f"; did you mean {meant}?" if meant else did_you_mean(name, known)
                raise RefusedError(f"{flag}: there is no section {name!r}{inside}{hint}")
            found = found[name]
            if not isinstance(found, dict):
                raise RefusedError(
                    f"{flag}: {'.'.join(sections[: depth + 1])} is a setting, not a section"
                )


def _take_name(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of the last --config, and the other words."""
    names = [word for word in words if re.match(r"--config(=|$)", word)]
    left = [word for word in words if word not in names]
    name = names[-1].partition("=")[2] if names else ""
    if not name:
        raise RefusedError(
            "--config is missing, for example --config=finetune.py:hybrid; see --help"
        )
    return name, left


def settings_near(name: str) -> list[str]:
    """Returns the flags of settings that a name may stand for, such as --lr.

    Args:
      name: Name of a flag without its dashes.
    """
    from peft_jax.training.config import default_config
    from peft_jax.training.setting_aliases import settings_called

    meant = settings_called(name.rpartition(".")[2], default_config().to_dict())
    return [one if one.startswith("--") else f"--config.{one}" for one in meant[:3]]


def find_config_file(path: str) -> Path:
    """Finds a configuration file, first at the path and then among those of peft_jax.

    Args:
      path: Path of the file, or the name of one of peft_jax, with or without `configs/`.

    Raises:
      RefusedError: There is no such file.
    """
    given = Path(path).expanduser()
    if given.exists() and not given.is_dir():
        return given
    shipped = shipped_configs()
    name = given.relative_to("configs") if given.is_relative_to("configs") else given
    if not given.is_absolute() and (shipped / name).is_file():
        return shipped / name
    names = [file.name for file in sorted(shipped.glob("[!_]*.py"))]
    near = difflib.get_close_matches(given.name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}" if near else ""
    raise RefusedError(
        f"there is no configuration file {path}{hint}; peft_jax has {', '.join(names)}"
    )


def shipped_configs() -> Path:
    """Returns the folder of peft_jax's configurations."""
    package = Path(peft_jax.__file__).parent
    installed = package / "configs"
    # In a checkout the folder is beside the package.
    return installed if installed.is_dir() else package.parent / "configs"


def explain_config_error(error: Exception, name: str) -> str:
    """Returns the message for a configuration that cannot be loaded, without tracebacks.

    Args:
      error: Error that was raised while it was loaded.
      name: Name of the configuration in the message.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    _, found, trace = text.partition("Error whilst parsing config file:")
    if found:
        lines = [line for line in trace.splitlines() if line.strip()]
        said = re.sub(r"^(builtins[.])?ValueError: ", "", lines[-1].strip())
        text = f"{name}: {said}"
    elif "has no attribute 'get_config'" in text:
        text = f"{name} has no get_config(); configs/finetune.py is an example"
    elif isinstance(error, SyntaxError):
        text = f"{error.filename}:{error.lineno}: {error.msg}"
    elif not isinstance(error, (flags.Error, KeyError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text.strip()
