r"""Writes an adapter as a merged model, for Hugging Face PEFT, or as a LoRA near it.

    peft-jax export --workdir=runs/mine --output=out
    peft-jax export --workdir=runs/mine --format=lora --rank=auto --output=out
    peft-jax export --adapter=someone/adapter --format=peft --output=out

--workdir names the folder of a finished run. --adapter names the folder of an
adapter, of peft_jax or of Hugging Face PEFT. The base model is the adapter's
own, unless --model names another.

--format=merged merges the adapter into the base model, which works for every
method; transformers and vLLM load the result. For GGUF, convert the merged
model with llama.cpp's convert_hf_to_gguf.py.

--format=peft writes `adapter_config.json` and `adapter_model.safetensors`,
which PEFT loads, and is rejected for a method that PEFT does not have.

--format=lora writes the LoRA adapter of --rank that is nearest to an adapter of
any method, for PEFT and vLLM, and prints the relative error of each module. With
--workdir it also prints the loss on the run's held-out rows before and after.
--rank=auto finds the least rank of vLLM's (8, 16, 32, 64, 128, 256, 320, 512)
with a loss at most 0.5% above the adapter's.

Each writes the tokenizer and a model card.

Exit codes: 0 done; 1 failed; 2 rejected. docs/exit_codes.md has those of all
commands.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

NAME = "peft_jax.export"
_FORMATS = ("merged", "peft", "lora", "gguf")
_DTYPES = ("bfloat16", "float16", "float32")


@exits.command(NAME)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = make_parser().parse_args(argv)
    if given.workdir is None and given.adapter is None:
        raise ValueError("no adapter is given; give --workdir or --adapter")
    rank = _read_rank(given.rank)
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from peft_jax.runtime.buckets import is_bucket
    from peft_jax.training.adapter_formats import adapter_of_run, export_adapter

    source = given.adapter
    if given.workdir is not None:
        adapter = adapter_of_run(given.workdir)
        source = adapter if is_bucket(given.workdir) else given.workdir
    exported = export_adapter(
        source,
        given.output,
        format=given.format,
        rank=rank,
        model=given.model,
        dtype=given.dtype,
    )
    for module, error in exported.errors.items():
        print(f"{module}: relative error {error:.2%}")
    for note in exported.notes:
        print(note)
    print(f"wrote the {'model' if given.format == 'merged' else 'adapter'} to {given.output}")
    return exits.ExitCode.DONE


def make_parser() -> Arguments:
    """Returns the parser of the command's flags."""
    parser = Arguments(NAME, description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workdir", help="folder of a finished run, also gs:// or s3://")
    source.add_argument("--adapter", help="folder of an adapter, or its name on the hub")
    add(
        "--model",
        help="folder of the base model, or its name on the hub; by default the adapter's own",
    )
    add("--output", type=Path, required=True, help="folder to write to, which must be empty")
    add(
        "--format",
        choices=_FORMATS,
        default="merged",
        help="merged: a merged model; peft: an adapter for Hugging Face PEFT; lora: the nearest"
        " LoRA adapter of --rank; gguf: rejected, with the commands to use",
    )
    add(
        "--rank",
        metavar="INTEGER|auto",
        help="rank for --format=lora; auto: the least that keeps the held-out loss; no default",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the merged model; by default that of the base model's config.json",
    )
    return parser


def _read_rank(text: str | None) -> int | Literal["auto"] | None:
    """Returns the value of --rank.

    Raises:
      ValueError: It is neither a number nor "auto".
    """
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--rank is {text!r}, but must be a positive integer, or auto")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
