"""Fine-tunes large language models by parameter-efficient methods.

    peft-jax COMMAND --help

says what a command does and which flags it takes.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments
from peft_jax.version import __version__


class _Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "train": _Command("peft_jax.commands.train", "fine-tune a model as a configuration says"),
    "plan": _Command(
        "peft_jax.commands.plan", "compile a run's step for other devices: memory and time"
    ),
    "generate": _Command("peft_jax.generation.command", "continue prompts with a model"),
    "eval": _Command("eval.command", "evaluate a run, an adapter or a checkpoint on benchmarks"),
    "study": _Command("eval.study.command", "compare methods on tasks, and write a page"),
    "convert": _Command("peft_jax.convert", "convert a checkpoint for many hosts"),
    "export": _Command(
        "peft_jax.commands.export", "write an adapter as a whole model, or for PEFT"
    ),
    "settings": _Command("peft_jax.settings", "print the settings of a run, with their defaults"),
}
"""The commands by name. Each module has a function `main` that takes the rest of the line."""


@exits.command(exits.PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the line names, and returns its exit code.

    Args:
      argv: The line without the program's name; None: that of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        _parser().print_help()
        return exits.ExitCode.DONE
    # What comes after the command's name is for the command.
    name = _parser().parse_args(words[:1]).command
    module = find_module(COMMANDS[name].module)
    # The command's messages and its --help begin with the name that it was started under.
    sys.argv = [f"{exits.PROGRAM} {name}", *words[1:]]
    code: int = importlib.import_module(module).main(words[1:])
    return code


def find_module(name: str) -> str:
    """Returns the name that a module has here.

    Evaluation is a folder of its own in a checkout, and `peft_jax.eval` once it is installed.

    Args:
      name: The module's name in a checkout.
    """
    installed = f"peft_jax.{name}"
    if name.startswith("eval.") and importlib.util.find_spec("peft_jax.eval") is not None:
        return installed
    return name


def _parser() -> Arguments:
    parser = Arguments(exits.PROGRAM, description=__doc__)
    width = max(map(len, COMMANDS))
    parser.epilog = "commands:\n" + "\n".join(
        f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()
    )
    parser.add_argument("--version", action="version", version=f"peft_jax {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
