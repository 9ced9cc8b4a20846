"""Writes and reads converted checkpoints: one chunked array per leaf, in a folder or a bucket.

    gs://bucket/llama/             or s3://…, file:///…, or a folder
      peft_jax_checkpoint.json     manifest; written last, and required for loading
      config.json, tokenizer.json…
      arrays/layers.mlp.up_proj.kernel/    Zarr array [layers, in, out], uncompressed
      converting/                  progress, during the conversion only

Kernels are stored [in, out], as they are multiplied, in chunks of about 4 MiB. A host that holds a
shard of a kernel reads only the chunks of that shard.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import tensorstore as ts

from peft_jax.core import Path, flatten, join_path
from peft_jax.hub.finite import check_finite
from peft_jax.hub.leaf_sources import LeafSource, Ranges
from peft_jax.models import Model
from peft_jax.runtime.buckets import SCHEMES, reach_store, store_spec
from peft_jax.runtime.files import atomic_folder, parse_json_object, read_json_object

_log = logging.getLogger(__name__)

MANIFEST = "peft_jax_checkpoint.json"

WEIGHTS = "weights"
"""Key in the manifest of the source weights' digest; null if the weights were rounded."""

_VERSION = 1
_ARRAYS = "arrays/"
_PROGRESS = "converting/"
_SETTINGS = f"{_PROGRESS}settings.json"

_CHUNK = (1, 1, 256, 8192)
"""Largest chunk of the stacked kernels of experts, by axis: 4 MiB in bfloat16."""

_PIECE = 64 * 2**20
"""Number of bytes copied at once, approximately."""

_SCHEMES = (*SCHEMES, "file")
"""Supported URL schemes."""

_IN_FLIGHT = 4
"""Largest number of concurrent reads or writes."""


def is_location(path: str) -> bool:
    """Returns whether a path is a URL, rather than a folder or a name on the hub.

    Example:
      >>> is_location("gs://bucket/model"), is_location("org/model")
      (True, False)
    """
    return "://" in path


def is_converted(folder: FilePath) -> bool:
    """Returns whether a folder holds a converted checkpoint, or its small files."""
    return (folder / MANIFEST).is_file()


def check_output(location: str) -> None:
    """Raises ValueError unless a location is empty or holds a conversion.

    Raises:
      ValueError: It is a file, holds something else, or cannot be reached.
    """
    folder = local_folder(location)
    try:
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{location} is a file; give a new folder or a bucket's URL")
            names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
            own = {MANIFEST, _PROGRESS.rstrip("/")} & set(names)
        else:
            store = _reach_store(location)
            own = {name for name in (MANIFEST, _SETTINGS) if _holds(store, name)}
            names = [] if own else [key.decode() for key in store.list().result()]
    except OSError as error:
        raise ValueError(f"{location} cannot be reached: {error}") from error
    if names and not own:
        raise ValueError(
            f"{location} holds {names[0]}{' and more' if len(names) > 1 else ''}, but no"
            " finished or started conversion; give an empty location, since nothing is overwritten"
        )


def convert(
    location: str,
    *,
    small_files: dict[str, bytes],
    leaves: dict[Path, LeafSource],
    shapes: dict[Path, tuple[int, ...]],
    dtype: str,
    identity: str,
    log: Callable[[str], None],
    weights: str | None = None,
) -> None:
    """Writes a converted checkpoint, resuming a conversion that was interrupted.

    Args:
      location: "gs://…", "s3://…", "file://…" or a folder.
      small_files: Contents of the configuration and tokenizer files, by name.
      leaves: Source of each leaf.
      shapes: Shape of each leaf.
      dtype: Dtype of the arrays.
      identity: Identifies the source; only a conversion of the same source is resumed.
      log: Called with progress messages.
      weights: Digest of the weights; None if they are rounded.

    Raises:
      ValueError: The location holds another conversion or something else.
    """
    check_output(location)
    store = _open_store(location)
    settings = json.dumps({"version": _VERSION, "dtype": dtype, "source": identity})
    begun = store.read(_SETTINGS).result()
    finished = store.read(MANIFEST).result()
    if begun.state == "missing" and finished.state == "missing":
        store.write(_SETTINGS, settings).result()
    elif finished.state != "missing":
        held = parse_json_object(finished.value, f"{MANIFEST} in {location}")
        if held.get("source") == identity and held.get("dtype") == dtype:
            log(f"{location} already holds this checkpoint")
            return
        if held.get("source") == identity:
            raise ValueError(
                f"{location} holds this checkpoint in {held.get('dtype')}, not in {dtype}; give"
                " another location, or delete it"
            )
        raise ValueError(
            f"{location} holds another checkpoint; give another location, or delete it"
        )
    elif begun.value.decode() != settings:
        raise ValueError(
            f"{location} holds an unfinished conversion of another checkpoint or to another dtype;"
            " give another location, or delete it"
        )
    done = {key.decode() for key in store.list(ts.KvStore.KeyRange(_PROGRESS)).result()}
    total = sum(math.prod(shape) for shape in shapes.values())
    moved = 0
    for path, shape in shapes.items():
        name = join_path(path)
        array = _open_array(location, name, shape=shape, dtype=dtype)
        for part in _layers(shape):
            mark = f"{_PROGRESS}{name}/{part[0][0]}"
            if mark not in done:
                _copy(leaves[path], array, part, dtype)
                store.write(mark, b"").result()
            moved += math.prod(stop - start for start, stop in part)
        log(f"{name}: {100 * moved / total:.0f}% of the values are written")
    for name, content in small_files.items():
        store.write(name, content).result()
    manifest = {
        "version": _VERSION,
        "source": identity,
        "dtype": dtype,
        WEIGHTS: weights,
        "arrays": {join_path(path): list(shape) for path, shape in shapes.items()},
        "files": sorted(small_files),
    }
    store.write(MANIFEST, json.dumps(manifest, indent=2).encode()).result()
    store.delete_range(ts.KvStore.KeyRange(_PROGRESS, _PROGRESS[:-1] + "0")).result()
    if (folder := local_folder(location)) is not None:
        # In a folder, delete_range removes the files but leaves the directories.
        shutil.rmtree(folder / _PROGRESS, ignore_errors=True)


def fetch_small_files(location: str, cache: FilePath) -> FilePath:
    """Fetches the configuration, tokenizer and manifest of a converted checkpoint.

    Args:
      location: Location of the checkpoint.
      cache: Folder under which the files are written.

    Returns:
      The folder with the files.

    Raises:
      ValueError: There is no converted checkpoint, or it cannot be reached.
    """
    store = _reach_store(location)
    found = store.read(MANIFEST).result()
    if found.state == "missing":
        raise ValueError(
            f"{location} holds no converted checkpoint (it has no {MANIFEST}); create one with"
            f" python -m peft_jax.convert MODEL {location}"
        )
    manifest = parse_json_object(found.value, f"{MANIFEST} in {location}")
    files = manifest.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{MANIFEST} in {location} sets files = {files!r}; it must be a list")
    folder = cache / hashlib.sha256(location.encode()).hexdigest()[:16]
    with atomic_folder(folder) as temporary:
        for name in files:
            if FilePath(name).name != name:
                raise ValueError(f"{location}: {name!r} in {MANIFEST} is not a file name")
            content = store.read(name).result()
            if content.state == "missing":
                raise ValueError(f"{location} lacks {name}, which {MANIFEST} lists")
            (temporary / name).write_bytes(content.value)
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "location": location}))
    return folder


def open_converted(folder: FilePath, model: Model) -> dict[Path, LeafSource]:
    """Returns the source of every leaf of a converted checkpoint.

    Raises:
      ValueError: The arrays do not fit the model.
    """
    manifest = read_json_object(folder / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{folder / MANIFEST} has version {manifest.get('version')}, but must have version"
            f" {_VERSION}; convert the checkpoint again"
        )
    location = str(manifest.get("location") or folder.absolute())
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict):
        raise ValueError(f"{folder / MANIFEST} sets arrays = {arrays!r}; it must be an object")
    sources: dict[Path, LeafSource] = {}
    for path, leaf in flatten(model.abstract_params()).items():
        name = join_path(path)
        if arrays.get(name) != list(leaf.shape):
            raise ValueError(
                f"{location} has {name} with shape {arrays.get(name)}, but config.json requires"
                f" {list(leaf.shape)}"
            )
        sources[path] = ConvertedLeaf(location, name)
    return sources


def warn_on_dtype(folder: FilePath, dtype: np.dtype) -> None:
    """Logs a warning if a checkpoint converted to a narrower dtype is loaded in float32.

    Args:
      folder: Folder for which `is_converted` returns True.
      dtype: Dtype of the loaded parameters.
    """
    manifest = read_json_object(folder / MANIFEST)
    held = manifest.get("dtype")
    if dtype != np.float32 or held == "float32":
        return
    location = manifest.get("location") or folder
    if manifest.get(WEIGHTS) is not None:
        why = f"its source is {held} too, so loading it in {held} takes half the memory"
    elif WEIGHTS in manifest:
        why = "its source was wider and was rounded by the conversion"
    else:
        why = "if its source was wider, it was rounded by the conversion"
    _log.warning("%s holds %s and is loaded in float32: %s", location, held, why)


@dataclasses.dataclass(frozen=True)
class ConvertedLeaf:
    """A leaf of a converted checkpoint.

    Attributes:
      location: Location of the checkpoint.
      name: Name of the leaf.
    """

    location: str
    name: str

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a range of the leaf, reading only the chunks that hold it."""
        array = _open_array(self.location, self.name)
        waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        for piece in _pieces(ranges, array.dtype.numpy_dtype.itemsize):
            within = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(piece, ranges, strict=True)
            )
            waiting.append((within, array[_slices(piece)].read()))
            if len(waiting) >= _IN_FLIGHT:
                self._store(target, *waiting.popleft())
        while waiting:
            self._store(target, *waiting.popleft())

    def _store(self, target: np.ndarray, within: tuple[slice, ...], reading: Any) -> None:
        values = reading.result()
        check_finite(values, target.dtype, name=self.name, where=self.location)
        target[within] = values


def _copy(source: LeafSource, array: ts.TensorStore, part: Ranges, dtype: str) -> None:
    """Copies a range of a leaf in pieces; returns once it is on disk or in the bucket."""
    numpy_dtype = array.dtype.numpy_dtype
    waiting: collections.deque[Any] = collections.deque()
    for piece in _pieces(part, numpy_dtype.itemsize):
        values = np.empty([stop - start for start, stop in piece], numpy_dtype)
        source.read_into(values, piece)
        waiting.append(array[_slices(piece)].write(values))
        if len(waiting) >= _IN_FLIGHT:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()


def _layers(shape: tuple[int, ...]) -> Iterator[Ranges]:
    """Yields ranges along a leaf's leading axis: one per layer of kernels, else the whole leaf."""
    rest = tuple((0, size) for size in shape[1:])
    step = 1 if len(shape) >= 3 else shape[0]
    for start in range(0, shape[0], step):
        yield ((start, start + step), *rest)


def _pieces(ranges: Ranges, itemsize: int) -> Iterator[Ranges]:
    """Splits a range into pieces of about `_PIECE` bytes, aligned to chunks."""
    if len(ranges) >= 3:
        first, last = ranges[0]
        for layer in range(first, last):
            for piece in _pieces(ranges[1:], itemsize):
                yield ((layer, layer + 1), *piece)
        return
    (first, last), *others = ranges
    row_bytes = itemsize * math.prod(stop - start for start, stop in others)
    step = max(1, _PIECE // max(1, row_bytes))
    step = max(_CHUNK[-2], step - step % _CHUNK[-2])
    start = first
    while start < last:
        # Pieces end at chunk boundaries, so that no chunk is written twice.
        stop = min(last, (start + step) - (start + step) % _CHUNK[-2])
        yield ((start, stop), *others)
        start = stop


def _slices(ranges: Ranges) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in ranges)


def _url(location: str) -> str:
    """Returns the location as a URL that ends in a slash.

    Example:
      >>> _url("gs://bucket/model"), _url("/data/model")
      ('gs://bucket/model/', 'file:///data/model/')
    """
    url = location if is_location(location) else f"file://{FilePath(location).absolute()}"
    return url.rstrip("/") + "/"


def local_folder(location: str) -> FilePath | None:
    """Returns the local folder of a location; None for an object store.

    Example:
      >>> str(local_folder("file:///data/my%20model")), local_folder("gs://bucket/model")
      ('/data/my model', None)
    """
    if not is_location(location):
        return FilePath(location).absolute()
    scheme, _, path = location.partition("://")
    return FilePath(urllib.parse.unquote(path)) if scheme == "file" else None


def _holds(store: ts.KvStore, name: str) -> bool:
    return store.read(name).result().state != "missing"


def _reach_store(location: str) -> ts.KvStore:
    """Opens a store and waits for its first response.

    Raises:
      ValueError: The URL scheme is not supported, or the store does not respond.
    """
    scheme = location.partition("://")[0]
    if is_location(location) and scheme not in _SCHEMES:
        raise ValueError(
            f"{location} begins with {scheme}://, which is not supported; give gs://bucket/folder,"
            " s3://bucket/folder or a folder"
        )
    return reach_store(_url(location), MANIFEST, shown=location)


def _open_store(location: str) -> ts.KvStore:
    return ts.KvStore.open(store_spec(_url(location))).result()


def _open_array(
    location: str, name: str, *, shape: tuple[int, ...] | None = None, dtype: str = ""
) -> ts.TensorStore:
    """Opens the array of one leaf; with a shape, creates it if it is missing."""
    kvstore = store_spec(f"{_url(location)}{_ARRAYS}{name}")
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore}
    if shape is None:
        return ts.open(spec, read=True).result()
    chunks = [min(most, size) for most, size in zip(_CHUNK[-len(shape) :], shape, strict=True)]
    spec["metadata"] = {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    return ts.open(spec, create=True, open=True, read=True, write=True).result()
