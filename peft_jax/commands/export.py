r"""Writes an adapter as a merged model in Hugging Face format, or as a PEFT adapter.

    peft-jax export --workdir=runs/mine --output=out/model
    peft-jax export --adapter=someone/adapter --format=peft --output=out/adapter

--workdir names the folder of a finished run. --adapter names the folder of an
adapter, of peft_jax or of Hugging Face PEFT. The base model is the adapter's
own, unless --model names another.

--format=merged merges the adapter into the base model, which works for every
method; transformers and vLLM load the result. --format=peft writes
`adapter_config.json` and `adapter_model.safetensors`, which PEFT loads, and is
rejected for a method that PEFT does not have. Both write the tokenizer.

Exit codes: 0 done; 1 failed; 2 rejected. docs/exit_codes.md has those of all
commands.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

if TYPE_CHECKING:
    from peft_jax.models import CausalLM

NAME = "peft_jax.export"
_GENERATION_CONFIG = "generation_config.json"
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
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from peft_jax.hub import find_folder

    adapter = find_folder(given.adapter or _adapter_of(given.workdir))
    _check_output(given.output, adapter)
    if given.format == "peft":
        export_peft(adapter, given.output, model=given.model)
    else:
        export_whole(adapter, given.output, model=given.model, dtype=given.dtype)
    print(f"wrote the {'adapter' if given.format == 'peft' else 'model'} to {given.output}")
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
        choices=("merged", "peft"),
        default="merged",
        help="merged: a merged model; peft: an adapter for Hugging Face PEFT",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the merged model; by default that of the base model's config.json",
    )
    return parser


def export_whole(
    adapter: Path, output: Path, *, model: str | None = None, dtype: str | None = None
) -> None:
    """Writes the merged model as a Hugging Face checkpoint, with its tokenizer.

    Args:
      adapter: Folder of the adapter.
      output: Folder to write to.
      model: Folder of the base model, or its name on the hub; None: the adapter's own.
      dtype: Dtype of the checkpoint; None: that of the base model's `config.json`.

    Raises:
      ValueError: The adapter or its base model cannot be loaded.
    """
    from peft_jax.hub import export_merged, load_adapter, load_params
    from peft_jax.runtime.files import atomic_folder

    base, lm = _base(adapter, model)
    dtype = dtype or _dtype_of(base)
    params = load_params(base, lm, dtype=dtype)
    spec, state = load_adapter(adapter, lm, params)
    with atomic_folder(output) as temporary:
        export_merged(temporary, lm, params, spec, state, dtype=dtype)
        _save_tokenizer(adapter, base, temporary)
        if (base / _GENERATION_CONFIG).is_file():
            shutil.copyfile(base / _GENERATION_CONFIG, temporary / _GENERATION_CONFIG)


def export_peft(adapter: Path, output: Path, *, model: str | None = None) -> None:
    """Writes an adapter that Hugging Face PEFT loads, with its tokenizer.

    Args:
      adapter: Folder of the adapter.
      output: Folder to write to.
      model: Folder of the base model, or its name on the hub; None: the adapter's own.

    Raises:
      ValueError: PEFT has no such method, or the adapter or its base model cannot be loaded.
    """
    from peft_jax.generation.loading import base_of
    from peft_jax.hub import load_adapter, save_adapter
    from peft_jax.hub.adapter_files import ARRAYS, CONFIG
    from peft_jax.runtime.files import atomic_folder, read_json_object

    base, lm = _base(adapter, model)
    spec, state = load_adapter(adapter, lm, lm.abstract_params())
    with atomic_folder(output) as temporary:
        save_adapter(temporary, lm, spec, state, model or base_of(adapter))
        form = read_json_object(temporary / CONFIG)["peft"]
        if not form["loads"]:
            raise ValueError(f"{adapter} cannot be written for PEFT: {form['why']}")
        # PEFT reads only the other two files.
        for name in (CONFIG, ARRAYS):
            (temporary / name).unlink(missing_ok=True)
        _save_tokenizer(adapter, base, temporary)


def _adapter_of(given: str) -> str | Path:
    """Returns the folder, or the location in a bucket, of a run's adapter.

    Raises:
      ValueError: The run has no adapter.
    """
    from peft_jax.runtime.buckets import is_bucket  # imports TensorStore

    if is_bucket(given):
        return f"{given.rstrip('/')}/adapter"
    workdir = Path(given)
    adapter = workdir / "adapter"
    if adapter.is_dir():
        return adapter
    if (workdir / "model").is_dir():
        raise ValueError(
            f"{workdir} has no adapter, because its run trained the whole model; use"
            f" {workdir / 'model'}"
        )
    raise ValueError(
        f"{workdir} has no adapter/, which a run writes when it finishes; resume the run with its"
        " training command"
    )


def _check_output(output: Path, adapter: Path) -> None:
    """Rejects an output folder that is not empty."""
    if output.is_file():
        raise ValueError(f"--output is {output}, which is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output is {output}, which holds {next(output.iterdir()).name}; give a new folder"
        )
    if output.resolve() == adapter.resolve():
        raise ValueError(f"--output is {output}, the adapter itself; give another folder")


def _base(adapter: Path, model: str | None) -> tuple[Path, "CausalLM"]:
    """Returns the base's folder, and its model without parameters."""
    from peft_jax.generation.loading import base_of
    from peft_jax.hub import find_folder, read_config
    from peft_jax.models import build_model

    folder = find_folder(model or base_of(adapter))
    built = build_model(read_config(folder))
    return folder, dataclasses.replace(built, origin=str(folder))


def _dtype_of(base: Path) -> str:
    """Returns the dtype that a base's configuration gives, or float32."""
    from peft_jax.hub import read_config

    config = read_config(base)
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in _DTYPES else "float32"


def _save_tokenizer(adapter: Path, base: Path, output: Path) -> None:
    """Saves the tokenizer that goes with the adapter, or else that of the base."""
    from peft_jax.hub.tokenizer import load_tokenizer

    own = (adapter / "tokenizer_config.json").is_file()
    load_tokenizer(adapter if own else base).save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
