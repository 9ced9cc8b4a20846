"""Computes digests of base and data files, to detect changes by content rather than by name.

A digest is a string that names its kind:

    sha256:…          SHA-256 of every byte, for files and arrays on disk below 1 GiB
    sampled-sha256:…  SHA-256 of the size and 32 evenly spaced blocks of 256 KiB, including the
                      first and the last byte, for larger files and for arrays in a bucket

A sampled digest detects another checkpoint or other rows, but may miss an edit between its blocks.
"""

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.hub.checkpoint import CONFIG, open_checkpoint
from peft_jax.hub.converted import (
    MANIFEST,
    ConvertedLeaf,
    is_converted,
    local_folder,
)
from peft_jax.hub.leaf_sources import Ranges
from peft_jax.runtime.files import read_json_object

WHOLE_BELOW = 2**30
"""Size in bytes below which files are read whole."""

_BLOCKS = 32
_BLOCK_BYTES = 256 * 2**10
_ARRAY_BLOCKS = 8
"""Number of blocks per array in a bucket, which returns whole chunks of 4 MiB."""

_TENSOR_BLOCKS = 8
_TENSOR_BLOCK_BYTES = 4 * 2**10

_THREADS = 8

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that determine how text is tokenized."""


def digest_file(file: Path) -> str:
    """Returns the digest of a file's content.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder, "rows.jsonl")
      ...     _ = file.write_bytes(b"{}")
      ...     digest_file(file)[:24]
      'sha256:44136fa355b3678a1'
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < WHOLE_BELOW:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        digest = hashlib.sha256(str(size).encode())
        for start in _starts(size, _BLOCK_BYTES, _BLOCKS):
            stream.seek(start)
            digest.update(stream.read(_BLOCK_BYTES))
        return f"sampled-sha256:{digest.hexdigest()}"


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the digests of several files, read in parallel.

    Args:
      files: Paths, by their names in records and messages.
    """
    return _run_parallel({name: (digest_file, (file,)) for name, file in files.items()})


def digest_weights(folder: Path) -> dict[str, str]:
    """Returns the digests of a checkpoint's weights by file; by array if it is converted.

    The index itself and files that it does not list are excluded.

    Args:
      folder: Folder of the checkpoint, as returned by `find_folder`.

    Raises:
      ValueError: There are no safetensors; see `open_checkpoint`.
    """
    if is_converted(folder):
        return _digest_converted(folder)
    files = {tensor.file for tensor in open_checkpoint(folder).tensors.values()}
    return digest_files({file.name: file for file in sorted(files)})


def digest_checkpoint(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """Returns the digests of a checkpoint's configuration, tokenizer and weights.

    Other files in the folder (model card, generation settings) are excluded.

    Args:
      folder: Folder of the checkpoint, as returned by `find_folder`.
      weights: Whether to include the weights.

    Raises:
      ValueError: See `digest_weights`.
    """
    names = [name for name in (CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()]
    digests = digest_files({name: folder / name for name in names})
    return {**digests, **digest_weights(folder)} if weights else digests


def sample_tensors(folder: Path) -> str:
    """Returns a digest of a checkpoint's tensors that does not depend on their files.

    It covers the name, dtype and shape of every tensor and 8 blocks of 4 KiB of its content, and
    takes milliseconds per tensor.

    Args:
      folder: Folder of the checkpoint, as returned by `find_folder`.

    Raises:
      ValueError: There are no safetensors; see `open_checkpoint`.
    """
    digest = hashlib.sha256()
    tensors = open_checkpoint(folder).tensors
    with contextlib.ExitStack() as stack:
        streams = {
            file: stack.enter_context(file.open("rb"))
            for file in {tensor.file for tensor in tensors.values()}
        }
        for name, tensor in sorted(tensors.items()):
            digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
            for start in _starts(tensor.nbytes, _TENSOR_BLOCK_BYTES, _TENSOR_BLOCKS):
                size = min(_TENSOR_BLOCK_BYTES, tensor.nbytes - start)
                streams[tensor.file].seek(tensor.start + start)
                digest.update(streams[tensor.file].read(size))
    return f"sampled-sha256:{digest.hexdigest()}"


def hub_commit(folder: Path) -> str | None:
    """Returns the commit of a folder in huggingface_hub's cache; None for other folders.

    Example:
      >>> hub_commit(Path("hub/models--org--model/snapshots/1a2b")), hub_commit(Path("/model"))
      ('1a2b', None)
    """
    parents = folder.parts[-3:-1]
    if len(parents) == 2 and parents[1] == "snapshots" and parents[0].startswith("models--"):
        return folder.name
    return None


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describes the differences between two sets of digests; empty if there are none.

    Args:
      before: Recorded digests, by name.
      now: Current digests, by name.

    Example:
      >>> changes({"a": "sha256:1", "b": "sha256:2"}, {"a": "sha256:3", "c": "sha256:4"})
      ['a has changed', 'b is no longer there', 'c is new']
    """
    words = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            words.append(f"{name} is no longer there")
        elif name not in before:
            words.append(f"{name} is new")
        elif before[name] != now[name]:
            words.append(f"{name} has changed")
    return words


def combined(digests: Mapping[str, str]) -> str:
    """Combines digests into one, independent of their order; sampled if any of them is.

    Example:
      >>> combined({"a": "sha256:1", "b": "sampled-sha256:2"})[:18]
      'sampled-sha256:22e'
    """
    text = "\n".join(itertools.chain.from_iterable(sorted(digests.items())))
    sampled = any(digest.startswith("sampled-") for digest in digests.values())
    return f"{'sampled-' if sampled else ''}sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _run_parallel(
    calls: Mapping[str, tuple[Callable[..., str], tuple[Any, ...]]],
) -> dict[str, str]:
    """Runs several calls in threads and returns their results by name.

    Hashing releases the interpreter's lock.
    """
    if len(calls) < 2:
        return {name: function(*given) for name, (function, given) in calls.items()}
    with ThreadPoolExecutor(min(_THREADS, len(calls))) as pool:
        waiting = {name: pool.submit(function, *given) for name, (function, given) in calls.items()}
        return {name: one.result() for name, one in waiting.items()}


def _starts(size: int, block: int, count: int) -> list[int]:
    """Returns the starts of evenly spaced blocks; the first begins at 0, the last ends at `size`.

    Example:
      >>> _starts(100, 10, 4), _starts(5, 10, 4)
      ([0, 30, 60, 90], [0])
    """
    last = max(size - block, 0)
    return sorted({last * index // max(count - 1, 1) for index in range(count)})


def _digest_converted(folder: Path) -> dict[str, str]:
    """Returns the digest of each array of a converted checkpoint."""
    manifest = read_json_object(folder / MANIFEST)
    location = str(manifest.get("location") or folder.absolute())
    dtype = jnp.dtype(manifest["dtype"])
    on_disk = local_folder(location) is not None
    return _run_parallel(
        {
            name: (_digest_array, (ConvertedLeaf(location, name), tuple(shape), dtype, on_disk))
            for name, shape in manifest["arrays"].items()
        }
    )


def _digest_array(
    leaf: ConvertedLeaf, shape: tuple[int, ...], dtype: np.dtype, on_disk: bool
) -> str:
    """Returns the digest of one array of a converted checkpoint."""
    whole = on_disk and math.prod(shape) * dtype.itemsize < WHOLE_BELOW
    digest = hashlib.sha256(repr((shape, dtype.name)).encode())
    for ranges in _all_of(shape) if whole else _sample_of(shape):
        values = np.empty([stop - start for start, stop in ranges], dtype)
        leaf.read_into(values, ranges)
        digest.update(values.tobytes())
    return f"{'' if whole else 'sampled-'}sha256:{digest.hexdigest()}"


def _all_of(shape: tuple[int, ...]) -> Iterable[Ranges]:
    """Yields ranges that cover an array, each one layer or some rows of its leading axis."""
    rest = tuple((0, size) for size in shape[1:])
    step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *rest)


def _sample_of(shape: tuple[int, ...]) -> Iterable[Ranges]:
    """Yields the ranges of evenly spaced rows of an array."""
    leading = shape[:-1]
    rows = math.prod(leading)
    for row in _starts(rows, 1, _ARRAY_BLOCKS):
        index = np.unravel_index(row, leading) if leading else ()
        yield (*((int(at), int(at) + 1) for at in index), (0, shape[-1]))
