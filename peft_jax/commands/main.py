"""Fine-tunes large language models with parameter-efficient methods.

    peft-jax COMMAND --help

describes a command and its flags.
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
    "train": _Command("peft_jax.commands.train", "fine-tune a model with a configuration"),
    "plan": _Command(
        "peft_jax.commands.plan", "predict the memory and time of a run on other devices"
    ),
    "generate": _Command("peft_jax.generation.command", "continue prompts with a model"),
    "eval": _Command("eval.command", "evaluate a run, an adapter or a checkpoint on benchmarks"),
    "study": _Command("eval.study.command", "compare methods on tasks, and write a page"),
    "convert": _Command("peft_jax.convert", "convert a checkpoint for many hosts"),
    "export": _Command(
        "peft_jax.commands.export", "write an adapter as a merged model, for PEFT, or as a LoRA"
    ),
    "combine": _Command("peft_jax.commands.combine", "combine several adapters into one LoRA"),
    "settings": _Command("peft_jax.settings", "print the settings of a run, with their defaults"),
}
"""Commands by name. Each module has a function `main` that takes the rest of the line."""


@exits.command(exits.PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the line names, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        _parser().print_help()
        return exits.ExitCode.DONE
    # The command parses the words after its name itself.
    name = _parser().parse_args(words[:1]).command
    module = find_module(COMMANDS[name].module)
    # The command's messages and its --help begin with `peft-jax` and its name.
    sys.argv = [f"{exits.PROGRAM} {name}", *words[1:]]
    code: int = importlib.import_module(module).main(words[1:])
    return code


def find_module(name: str) -> str:
    """Returns the name under which a module can be imported.

    The evaluation is the package `eval` in a checkout, and `peft_jax.eval` in an installation.

    Args:
      name: Name of the module in a checkout.
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
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="a command of the list below"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
