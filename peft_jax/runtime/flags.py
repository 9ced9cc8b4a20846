"""Parses command lines: every command has the same form of --help and of error messages."""

import argparse
import difflib
import importlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeVar

from peft_jax.runtime import exits

N = TypeVar("N")

_WIDTH = 80
_KINDS = MappingProxyType({int: "INTEGER", float: "NUMBER", Path: "PATH"})


class Arguments(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line that names the nearest flag.

    It takes no abbreviations, and has the flags --traceback and --import of all commands. Its
    --help wraps between words at 80 columns, keeps indented lines as they are, and gives the
    default of each flag.

    Args:
      name: Name of the command, as `exits.command` has it.
      description: Text of --help; usually the module's docstring.
    """

    def __init__(self, name: str, *, description: str | None):
        started = exits.started_as(name)
        if started == name and name != exits.PROGRAM:
            started = f"python {name}" if name.endswith(".py") else f"python -m {name}"
        super().__init__(
            prog=started,
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self._name = name
        self.add_argument(
            "--traceback",
            action="store_true",
            help="show where in the program a rejected command was rejected",
        )
        self.add_argument(
            "--import",
            action="append",
            default=[],
            dest="imports",
            metavar="MODULE",
            help="a module of yours that registers methods, such as my_package.my_method; may be"
            " given several times",
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: N | None = None
    ) -> N | argparse.Namespace:
        """Returns the values of the flags, or ends the program with one message."""
        given, left = self.parse_known_args(args, namespace)
        if left:
            self.error(self._explain_unknown(left[0]))
        for module in vars(given)["imports"]:
            self._import(module)
        return given

    def error(self, message: str) -> NoReturn:
        """Ends the program, with nothing done."""
        exits.say(f"{message}; see --help", name=self._name)
        raise SystemExit(int(exits.ExitCode.REFUSED))

    def _import(self, name: str) -> None:
        """Imports a module of the user's, which may lie in the current folder."""
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            self.error(f"--import={name}: there is no module {error.name}, here or installed")

    def near(self, flag: str) -> Iterable[str]:
        """Returns known flags whose names are close to an unknown one."""
        return difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)

    def _explain_unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"{word!r} is not a flag; flags begin with two dashes"
        near = list(self.near(flag))
        return f"there is no flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "")


class _Formatter(argparse.HelpFormatter):
    """Formats --help; see `Arguments`."""

    def __init__(self, prog: str):
        width = min(_WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(self._fill_paragraph(one, width, indent) for one in paragraphs)

    def _fill_paragraph(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        if any(line.startswith((" ", "- ")) for line in lines):
            return "\n".join(indent + line for line in lines)
        return textwrap.fill(
            " ".join(lines),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(
            " ".join(text.split()), width, break_long_words=False, break_on_hyphens=False
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        known = "default" in text or not action.option_strings or action.required
        if known or action.default is argparse.SUPPRESS:
            return text
        return f"{text} (default: {_as_words(action.default)})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _KINDS.get(action.type, "TEXT")  # type: ignore[call-overload]


def _as_words(default: object) -> str:
    """Returns a default as --help shows it."""
    if default is None or default in ("", [], ()):
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    # argparse formats the text with the operator %.
    return str(default).replace("%", "%%")
