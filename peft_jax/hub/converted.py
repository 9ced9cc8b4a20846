"""A checkpoint converted for many hosts: one array a leaf, in chunks, in a folder or a bucket.

    gs://bucket/llama/             or s3://…, file:///…, or a folder
      peft_jax_checkpoint.json     what there is; written last, so without it nothing is loaded
      config.json, tokenizer.json…
      arrays/layers.mlp.up_proj.kernel/    a Zarr array [layers, in, out], uncompressed
      converting/                  what is done already, while it is being made

Kernels lie as they are multiplied, [in, out], and in chunks of about 4 MiB, so that a host that
holds a part of a kernel asks for the chunks of that part and nothing else.
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
from peft_jax.runtime.files import atomic_folder, parse_json_object, read_json_object

_log = logging.getLogger(__name__)

MANIFEST = "peft_jax_checkpoint.json"

WEIGHTS = "weights"
"""The manifest's key for the digest of the weights that were converted; null if rounded."""

_VERSION = 1
_ARRAYS = "arrays/"
_PROGRESS = "converting/"
_SETTINGS = f"{_PROGRESS}settings.json"

_CHUNK = (1, 256, 8192)
"""The most of a stacked kernel in one chunk: 4 MiB in bfloat16."""

_PIECE = 64 * 2**20
"""About how many bytes are moved at a time."""

_SCHEMES = ("gs", "s3", "file")
"""The stores that a conversion is kept in."""

_CONTACT_SECONDS = 12.0
"""How long a store may take for its first answer; TensorStore itself would try for an hour."""

_IN_FLIGHT = 4
"""How many pieces wait to be read or written at a time, at most."""


def is_location(path: str) -> bool:
    """Whether a path is an object store's, and no folder or name: it says how it is reached.

    Example:
      >>> is_location("gs://bucket/model"), is_location("org/model")
      (True, False)
    """
    return "://" in path


def is_converted(folder: FilePath) -> bool:
    """Whether a folder holds a converted checkpoint, or what `fetch_small_files` fetched of one."""
    return (folder / MANIFEST).is_file()


def check_place(location: str) -> None:
    """Whether a conversion may be begun, or gone on with, at a place: it has to be empty or one.

    Raises:
      ValueError: it is a file, holds something else, or cannot be reached.
    """
    folder = local_folder(location)
    try:
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{location} is a file: give a new folder, or a bucket's address")
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
            f"{location} holds {names[0]}{' and more' if len(names) > 1 else ''}, and no"
            " conversion, finished or begun; nothing is overwritten: give an empty place"
        )


def convert(
    location: str,
    *,
    small_files: dict[str, bytes],
    leaves: dict[Path, LeafSource],
    shapes: dict[Path, tuple[int, ...]],
    dtype: str,
    identity: str,
    say: Callable[[str], None],
    weights: str | None = None,
) -> None:
    """Writes a converted checkpoint; a piece at a time, and going on where it was stopped.

    Args:
      location: "gs://…", "s3://…", "file://…" or a folder.
      small_files: what else belongs to the checkpoint, by name.
      leaves: where each leaf is read from.
      shapes: of each leaf.
      dtype: of the arrays.
      identity: what the checkpoint is read from; a conversion of something else is not gone on
        with.
      say: told of the progress.
      weights: the digest of the weights, where no number is rounded.

    Raises:
      ValueError: another conversion was begun at the location, or it holds something else.
    """
    check_place(location)
    store = _open_store(location)
    settings = json.dumps({"version": _VERSION, "dtype": dtype, "source": identity})
    begun = store.read(_SETTINGS).result()
    finished = store.read(MANIFEST).result()
    if begun.state == "missing" and finished.state == "missing":
        store.write(_SETTINGS, settings).result()
    elif finished.state != "missing":
        held = parse_json_object(finished.value, f"{MANIFEST} in {location}")
        if held.get("source") == identity and held.get("dtype") == dtype:
            say(f"{location} holds this checkpoint already")
            return
        if held.get("source") == identity:
            raise ValueError(
                f"{location} holds this checkpoint in {held.get('dtype')}, and not in {dtype}: give"
                " another place, or delete it"
            )
        raise ValueError(f"{location} holds another checkpoint: give another place, or delete it")
    elif begun.value.decode() != settings:
        raise ValueError(
            f"{location} holds the beginning of another conversion, of another checkpoint or in"
            " another dtype: give another place, or delete it"
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
        say(f"{name}: {100 * moved / total:.0f}% of the numbers are there")
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
        # Of a folder the files alone have been deleted.
        shutil.rmtree(folder / _PROGRESS, ignore_errors=True)


def fetch_small_files(location: str, cache: FilePath) -> FilePath:
    """A folder with the configuration, the tokenizer and the manifest of a converted checkpoint.

    Args:
      location: where the checkpoint is.
      cache: under which the folder is made anew.

    Raises:
      ValueError: there is no converted checkpoint, or it cannot be reached.
    """
    store = _reach_store(location)
    found = store.read(MANIFEST).result()
    if found.state == "missing":
        raise ValueError(
            f"{location} holds no converted checkpoint (it has no {MANIFEST}); make one with"
            f" python -m peft_jax.convert MODEL {location}"
        )
    manifest = parse_json_object(found.value, f"{MANIFEST} in {location}")
    files = manifest.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{MANIFEST} in {location} does not list the files that belong to it")
    folder = cache / hashlib.sha256(location.encode()).hexdigest()[:16]
    with atomic_folder(folder) as temporary:
        for name in files:
            if FilePath(name).name != name:
                raise ValueError(f"{location}: {name!r} in {MANIFEST} is not the name of a file")
            content = store.read(name).result()
            if content.state == "missing":
                raise ValueError(f"{location} lacks {name}, which {MANIFEST} lists")
            (temporary / name).write_bytes(content.value)
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "location": location}))
    return folder


def open_converted(folder: FilePath, model: Model) -> dict[Path, LeafSource]:
    """Where the numbers of every leaf of a converted checkpoint are read from.

    Raises:
      ValueError: the arrays are not the model's.
    """
    manifest = read_json_object(folder / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{folder / MANIFEST} is of version {manifest.get('version')}, and this is version"
            f" {_VERSION}: convert the checkpoint again"
        )
    location = str(manifest.get("location") or folder.absolute())
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict):
        raise ValueError(f"{folder / MANIFEST} does not list the arrays of the checkpoint")
    sources: dict[Path, LeafSource] = {}
    for path, leaf in flatten(model.abstract_params()).items():
        name = join_path(path)
        if arrays.get(name) != list(leaf.shape):
            raise ValueError(
                f"{location} has {name} as {arrays.get(name)}, and config.json makes it"
                f" {list(leaf.shape)}"
            )
        sources[path] = ConvertedLeaf(location, name)
    return sources


def warn_of_dtype(folder: FilePath, dtype: np.dtype) -> None:
    """Warns where a checkpoint is loaded in float32 and was converted to something narrower.

    Args:
      folder: what `is_converted` says yes to.
      dtype: what it is loaded in.
    """
    manifest = read_json_object(folder / MANIFEST)
    held = manifest.get("dtype")
    if dtype != np.float32 or held == "float32":
        return
    location = manifest.get("location") or folder
    if manifest.get(WEIGHTS) is not None:
        why = f"its source is {held} too: {held} takes half the memory for the same numbers"
    elif WEIGHTS in manifest:
        why = "its source was wider, and was rounded when it was converted"
    else:
        why = "if its source was wider, it was rounded when it was converted"
    _log.warning("%s holds %s and is loaded in float32: %s", location, held, why)


@dataclasses.dataclass(frozen=True)
class ConvertedLeaf:
    """A leaf in a converted checkpoint.

    Attributes:
      location: of the checkpoint.
      name: of the leaf.
    """

    location: str
    name: str

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a part of the leaf; the chunks that hold it are read."""
        array = _open_array(self.location, self.name)
        waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        for piece in _pieces(ranges, array.dtype.numpy_dtype.itemsize):
            within = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(piece, ranges, strict=True)
            )
            waiting.append((within, array[_slices(piece)].read()))
            if len(waiting) >= _IN_FLIGHT:
                self._take(target, *waiting.popleft())
        while waiting:
            self._take(target, *waiting.popleft())

    def _take(self, target: np.ndarray, within: tuple[slice, ...], reading: Any) -> None:
        values = reading.result()
        check_finite(values, target.dtype, name=self.name, where=self.location)
        target[within] = values


def _copy(source: LeafSource, array: ts.TensorStore, part: Ranges, dtype: str) -> None:
    """Writes a part of a leaf, a piece at a time; it is on disk, or in the bucket, at the end."""
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
    """A leaf's parts along its leading axis: one a layer of a kernel, and large parts of others."""
    rest = tuple((0, size) for size in shape[1:])
    step = 1 if len(shape) == 3 else shape[0]
    for start in range(0, shape[0], step):
        yield ((start, start + step), *rest)


def _pieces(ranges: Ranges, itemsize: int) -> Iterator[Ranges]:
    """A part cut into pieces of about `_PIECE`: single layers, and chunks' rows of matrices."""
    if len(ranges) == 3:
        first, last = ranges[0]
        for layer in range(first, last):
            for piece in _pieces(ranges[1:], itemsize):
                yield ((layer, layer + 1), *piece)
        return
    (first, last), *others = ranges
    row_bytes = itemsize * math.prod(stop - start for start, stop in others)
    step = max(1, _PIECE // max(1, row_bytes))
    step = max(_CHUNK[1], step - step % _CHUNK[1])
    start = first
    while start < last:
        # Along the chunks' bounds, so that none is written twice.
        stop = min(last, (start + step) - (start + step) % _CHUNK[1])
        yield ((start, stop), *others)
        start = stop


def _slices(ranges: Ranges) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in ranges)


def _url(location: str) -> str:
    """The location as a URL that ends in a slash.

    Example:
      >>> _url("gs://bucket/model"), _url("/data/model")
      ('gs://bucket/model/', 'file:///data/model/')
    """
    url = location if is_location(location) else f"file://{FilePath(location).absolute()}"
    return url.rstrip("/") + "/"


def local_folder(location: str) -> FilePath | None:
    """The folder that a location stands for; None for an object store's.

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
    """Opens a store, and waits for its first answer.

    Raises:
      ValueError: nothing can be kept at such an address, or nothing answers there.
    """
    scheme = location.partition("://")[0]
    if is_location(location) and scheme not in _SCHEMES:
        raise ValueError(
            f"{location} begins with {scheme}://, where no checkpoint can be converted to or read"
            " from; give gs://bucket/folder, s3://bucket/folder or a folder"
        )
    try:
        store = _open_store(location)
        store.read(MANIFEST).result(timeout=_CONTACT_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"{location} cannot be reached: there was no answer in {_CONTACT_SECONDS:.0f} seconds;"
            " see that the bucket exists, that this machine has credentials for it, and its network"
        ) from error
    except ValueError as error:
        reason = str(error).partition(" [")[0]
        raise ValueError(
            f"{location} cannot be reached: {reason}; give the address of a bucket that this"
            " machine may use, gs://bucket/folder or s3://bucket/folder, or a folder"
        ) from error
    return store


def _open_store(location: str) -> ts.KvStore:
    return ts.KvStore.open(_url(location)).result()


def _open_array(
    location: str, name: str, *, shape: tuple[int, ...] | None = None, dtype: str = ""
) -> ts.TensorStore:
    """The array of one leaf; with a shape, one that may have to be made."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": f"{_url(location)}{_ARRAYS}{name}/"}
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
