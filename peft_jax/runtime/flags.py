"""The command line of a program with flags alone: one message for what is wrong with it."""

import argparse
import difflib
import re
from typing import NoReturn

from peft_jax.runtime import exits


class Arguments(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line that names the nearest flag.

    It takes no abbreviations, and has the flag --traceback of all commands.

    Args:
      name: the command's name, which messages begin with.
      usage: how the command is started.
      description: the text of --help.
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
            help="show where in the program a refused command was refused",
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program, with nothing done."""
        exits.say(f"{message}{self._nearest(message)}; see --help", name=self._name)
        raise SystemExit(int(exits.ExitCode.REFUSED))

    def _nearest(self, message: str) -> str:
        """The flag that was probably meant, where one is not known."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown is None:
            return ""
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""
