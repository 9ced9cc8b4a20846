"""Safetensors files, read and written a piece at a time.

The `safetensors` package maps whole files into memory or builds them there; a model that is loaded
into stacked arrays wants rows of one tensor after another, and nothing else resident. A file is
eight bytes of header length (little-endian), a JSON header of names, dtypes, shapes and byte
ranges, and the bytes (https://huggingface.co/docs/safetensors).
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from peft_jax.runtime.files import atomic_file

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The floating-point dtypes of safetensors that hold weights as they are."""

_PIECE = 32 * 2**20

_LONG_ROW = 8192
"""Bytes of a row from which on a part of it is read by itself; disks read pages of 4096."""

_READERS = 8
"""How many parts of rows are asked for at a time: a disk that is asked for one at a time waits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
      file: where it is.
      name: what it is called there.
      dtype: safetensors' name of its dtype.
      shape: of the tensor, as stored.
      start: the offset of its first byte in the file.
      nbytes: how many bytes it has there.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of what `pieces` gives.

        Raises:
          ValueError: the tensor is not of a floating-point dtype known here (it is quantized).
        """
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.name} in {self.file} has the dtype {self.dtype}: quantized checkpoints are"
                f" not read; known: {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def pieces(
        self, rows: slice | None = None, columns: slice | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The tensor along its leading axis, some rows at a time (of about 32 MiB).

        Args:
          rows: which rows are wanted, a slice without step; all by default.
          columns: which part of the second axis is wanted, likewise. Where that is less than half
            of long rows, nothing else is read from the file.

        Yields:
          The rows' place along the leading axis, and their values [rows, columns, ...].
        """
        if not self.shape:
            raise ValueError(f"{self.name} in {self.file} is a scalar, which no model has")
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        row_bytes = self.numpy_dtype.itemsize * math.prod(self.shape[1:])
        left, width, inside = 0, self.shape[1:2], slice(None)
        if columns is not None:
            left, right, _ = columns.indices(self.shape[1])
            width = (right - left,)
            if row_bytes >= _LONG_ROW and 2 * width[0] <= self.shape[1]:
                left *= row_bytes // self.shape[1]
            else:
                left, width, inside = 0, self.shape[1:2], slice(left, right)
        shape = (*width, *self.shape[2:])
        step = max(1, _PIECE // max(self.numpy_dtype.itemsize * math.prod(shape), 1))
        with self.file.open("rb", buffering=0) as stream:
            for begin in range(first, last, step):
                end = min(begin + step, last)
                piece = np.empty((end - begin, *shape), self.numpy_dtype)
                start = self.start + begin * row_bytes + left
                _read_rows(stream.fileno(), piece, start, row_bytes, self.file)
                yield slice(begin, end), piece[:, inside] if columns is not None else piece


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
      ValueError: the safetensors library does not take the file: its header is not one, or the
        tensors do not cover the file's bytes, each of them once.
    """
    _check_header(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: StoredTensor(
            file=file,
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + length + entry["data_offsets"][0],
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _check_header(file: Path) -> None:
    """Checks a file's header by the safetensors library's own rules; tensors are not read.

    Raises:
      ValueError: the library does not take the file.
    """
    size = file.stat().st_size
    if size < 8:
        raise ValueError(f"{file} is not a safetensors file, or is cut short ({size} bytes)")
    try:
        with safetensors.safe_open(file, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a safetensors file, or is cut short or damaged ({size:,} bytes):"
            f" {error}"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor that is fetched only when its turn comes.

    Attributes:
      name: what it is called in the file.
      dtype: of the tensor.
      shape: of the tensor.
      fetch: gives the array.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(
    file: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, holding one tensor at a time.

    The file is written beside its place, and moved there once it is on disk.

    Raises:
      ValueError: a dtype safetensors has no name for here.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in names:
            raise ValueError(
                f"{tensor.name} has the dtype {tensor.dtype}; known: {', '.join(map(str, names))}"
            )
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.fetch())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name} is {array.dtype} {array.shape}, and was said to be"
                    f" {tensor.dtype} {tensor.shape}"
                )
            stream.write(_as_bytes(array))


def _as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied; numpy exports no buffer of bfloat16."""
    return array.reshape(-1).view(np.uint8).data


def _read_rows(descriptor: int, piece: np.ndarray, start: int, stride: int, file: Path) -> None:
    """Fills an array from a file: its first row from `start` on, and each `stride` bytes later."""
    if not piece.size:
        return
    row_bytes = piece.nbytes // len(piece)
    if row_bytes == stride:
        _read_into(descriptor, _as_bytes(piece), start, file)
        return
    rows = _as_bytes(piece)

    def read(first: int) -> None:
        for row in range(first, len(piece), _READERS):
            part = rows[row * row_bytes : (row + 1) * row_bytes]
            _read_into(descriptor, part, start + row * stride, file)

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read, range(_READERS)):
            pass


def _read_into(descriptor: int, view: memoryview, start: int, file: Path) -> None:
    """Fills a buffer from a file's bytes from `start` on."""
    while len(view):
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise ValueError(f"{file} is cut short")
        view = view[count:]
        start += count
