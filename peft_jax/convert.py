"""Converts a Hugging Face checkpoint for many hosts, in a folder or a bucket.

    peft-jax convert /path/to/checkpoint gs://bucket/llama-405b

Give the output as `model.path` instead of the checkpoint. Every host then
reads only the shards of its own devices. The command needs a few hundred MiB of
memory for any model. The same command again resumes an interrupted conversion.

The weights keep their dtype and their exact values. --dtype=bfloat16 rounds a
float32 checkpoint, with a message.

Exit codes: 0 done; 1 failed; 2 rejected; 130 stopped by Ctrl-C.
docs/exit_codes.md has those of all commands.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

from peft_jax.core import Path, flatten
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.adapter_base import base_digest
from peft_jax.hub.checkpoint import INDEX, open_checkpoint
from peft_jax.hub.converted import check_output, convert, is_converted, local_folder
from peft_jax.hub.fetch import FETCHED
from peft_jax.hub.leaf_sources import LeafSource, StoredExperts, StoredLeaf
from peft_jax.hub.load import open_sources
from peft_jax.hub.mxfp4 import PackedExperts
from peft_jax.models import build_model
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

_DTYPES: Mapping[str, frozenset[str]] = {
    "bfloat16": frozenset({"BF16"}),
    "float16": frozenset({"F16"}),
    "float32": frozenset({"BF16", "F16", "F32"}),
}
"""Output dtypes, each with the safetensors dtypes that it represents exactly."""


@exits.command("peft_jax.convert", stopped="stopped; the same command resumes from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = _parser().parse_args(argv)
    convert_checkpoint(given.model, given.out, dtype=given.dtype, revision=given.revision)
    return exits.ExitCode.DONE


def convert_checkpoint(
    model: str, out: str, *, dtype: str | None = None, revision: str | None = None
) -> None:
    """Converts a checkpoint for many hosts.

    Args:
      model: Folder with safetensors, or a name on the Hugging Face hub.
      out: "gs://…", "s3://…", "file://…" or a folder.
      dtype: Output dtype, "bfloat16", "float16" or "float32"; None: the narrowest that represents
        the checkpoint exactly, or float32.
      revision: Branch, tag or commit on the hub.

    Raises:
      ValueError: The checkpoint cannot be read, or `out` holds something else.
    """
    given, place = FilePath(model).expanduser(), local_folder(out)
    if place is not None and given.is_dir() and given.resolve() == place.resolve():
        raise ValueError(f"{out} is the checkpoint itself; give another output folder")
    # Checked before the download of the checkpoint, which may take hours.
    check_output(out)
    folder = find_folder(model, revision=revision)
    if is_converted(folder):
        raise ValueError(f"{model} is already converted; give the original checkpoint")
    lm = build_model(read_config(folder))
    leaves = open_sources(folder, lm)
    stored = _stored_dtypes(leaves)
    dtype = dtype or next((name for name, held in _DTYPES.items() if stored <= held), "float32")
    exact = stored <= _DTYPES[dtype]
    if not exact:
        print(
            f"rounding weights from {', '.join(sorted(stored))} to {dtype}"
            + ("" if dtype == "float32" else "; --dtype=float32 rounds less")
        )
    convert(
        out,
        small_files=_small_files(folder),
        leaves=leaves,
        shapes={path: leaf.shape for path, leaf in flatten(lm.abstract_params()).items()},
        dtype=dtype,
        identity=_identity(folder),
        weights=base_digest(folder) if exact else None,
        log=print,
    )


def _stored_dtypes(leaves: Mapping[Path, LeafSource]) -> set[str]:
    """Returns the stored dtypes of the leaves, by safetensors' names."""
    stored = (StoredLeaf, StoredExperts, PackedExperts)
    return {name for leaf in leaves.values() if isinstance(leaf, stored) for name in leaf.dtypes}


def _small_files(folder: FilePath) -> dict[str, bytes]:
    """Reads the configuration and tokenizer files."""
    patterns = [pattern for pattern in FETCHED if not pattern.endswith(".safetensors")]
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return {file.name: file.read_bytes() for file in files if file.name != INDEX}


def _identity(folder: FilePath) -> str:
    """Returns a digest of every tensor's name, dtype, shape and location in the checkpoint."""
    tensors = [
        (name, tensor.dtype, tensor.shape, tensor.file.name, tensor.start)
        for name, tensor in sorted(open_checkpoint(folder).tensors.items())
    ]
    return hashlib.sha256(json.dumps(tensors).encode()).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = Arguments("peft_jax.convert", description=__doc__)
    parser.add_argument("model", help="folder with safetensors, or a name on the hub")
    parser.add_argument("out", help="gs://bucket/folder, s3://bucket/folder, or a folder")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="dtype of the output; by default that of the checkpoint"
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit on the hub; by default the newest commit"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
