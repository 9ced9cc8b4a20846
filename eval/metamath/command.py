r"""Adds a row to PEFT's comparison of methods on MetaMathQA and GSM8K.

    python -m eval.metamath --config=metamath.py:lora --workdir=runs/metamath/lora

trains Llama-3.2-3B on MetaMathQA with the configuration's method, answers the
questions of GSM8K, and writes row.json, in the form of the published results.
docs/metamath.md describes the protocol.

Exit codes: 0 done; 1 failed; 2 rejected; 130 stopped by Ctrl-C.
docs/exit_codes.md has those of all commands.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_jax.commands.config_flags import ConfigArguments
from peft_jax.runtime import exits
from peft_jax.runtime.errors import RefusedError

WIKIPEDIA = "HuggingFaceFW/finewiki"
"""Data set of the texts on which forgetting is measured."""

_TEXTS = 100


@exits.command("eval.metamath", stopped="stopped; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = make_parser().parse_args(argv)
    if given.workdir is None:
        raise ValueError("--workdir is missing, for example --workdir=runs/metamath/lora")
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from peft_jax.training import from_config_dict

    from .run import run_metamath

    config = from_config_dict(given.config.values)
    name = given.name or f"{config.spec.method.name}/{given.workdir.name}"
    texts = read_texts(given.texts)
    row = run_metamath(config, given.workdir, name=name, texts=texts, say=_say)
    test = row["train_info"]["metrics"][-1]
    _say(f"test accuracy {test['test accuracy']:.4f}; row: {given.workdir / 'row.json'}")
    return exits.ExitCode.DONE


def make_parser() -> ConfigArguments:
    """Returns the parser of the command's flags."""
    parser = ConfigArguments("eval.metamath", description=__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, help="folder of row.json and adapter/, which must have no row yet")
    add("--name", default="", help="name of the experiment in the row; by default METHOD/WORKDIR")
    add(
        "--texts",
        default=WIKIPEDIA,
        metavar="PATH",
        help="file of JSON lines with a field text, or data set on the hub, whose first 100 texts"
        ' measure forgetting; "none" does not measure it',
    )
    return parser


def read_texts(path: str) -> list[str]:
    """Returns the first texts of a file of JSON lines, or of a data set on the hub.

    Args:
      path: File or name; "none" for none.

    Raises:
      RefusedError: There is no such file or data set, or a line has no text.
    """
    if path == "none":
        return []
    if Path(path).is_file():
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:_TEXTS]
        try:
            return [json.loads(line)["text"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f"{path} has a line without a field text: {error}") from error
    import datasets

    try:
        stream = datasets.load_dataset(path, split="train", streaming=True)
        return [row["text"] for row in stream.take(_TEXTS)]
    except Exception as error:
        # The hub's client raises errors of many types.
        raise RefusedError(
            f"--texts is {path!r}, which cannot be read: {error}; give a file of JSON lines with a"
            " field text, or --texts=none"
        ) from error


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
