"""Parses command lines that consist of flags, with one-line error messages."""

import argparse
import difflib
import re
from typing import NoReturn

from peft_jax.runtime import exits


class Arguments(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line that names the nearest flag.

    It accepts no abbreviations, and has the flag --traceback of all commands.

    Args:
      name: Name of the command; messages begin with it.
      usage: Command line that starts the command.
      description: Text of --help.
    """

    def __init__(self, name: str, *, usage: str, description: str | None):
        super().__init__(
            prog=usage,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._name = name
        self.add_argument(
            "--traceback",
            action="store_true",
            help="print the traceback of an error before its message",
        )

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        exits.say(f"{message}{self._nearest(message)}; see --help", name=self._name)
        raise SystemExit(int(exits.ExitCode.REFUSED))

    def _nearest(self, message: str) -> str:
        """Returns a phrase that suggests the nearest flag, if a flag is unknown."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown is None:
            return ""
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""
