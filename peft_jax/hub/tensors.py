"""Reads and writes safetensors files in pieces.

The `safetensors` package maps or builds whole files in memory. Loading into stacked arrays needs
only some rows of one tensor at a time, so this module reads just those. A file consists of the
header length (eight bytes, little-endian), a JSON header of names, dtypes, shapes and byte ranges,
and the data (https://huggingface.co/docs/safetensors).
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
"""Floating-point dtypes of safetensors that hold unquantized weights."""

INTEGERS: Mapping[str, np.dtype] = {"I32": np.dtype(np.int32)}
"""Integer dtypes of safetensors that hold an adapter's constants, such as places in a kernel."""

_PIECE = 32 * 2**20

_LONG_ROW = 8192
"""Smallest row, in bytes, of which a part is read separately; disks read pages of 4096."""

_READERS = 8
"""Number of threads that read parts of rows; one alone would leave the disk idle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
      file: Path of the file.
      name: Name of the tensor in the file.
      dtype: Safetensors' name of the dtype.
      shape: Stored shape.
      start: Offset of the first byte in the file.
      nbytes: Number of bytes in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of the arrays that `pieces` yields.

        Raises:
          ValueError: The dtype is not in `DTYPES` (the tensor is quantized).
        """
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.name} in {self.file} has the dtype {self.dtype}, but must have one of"
                f" {', '.join(DTYPES)}; quantized checkpoints are not supported"
            )
        return DTYPES[self.dtype]

    @property
    def stored_dtype(self) -> np.dtype:
        """Returns the dtype of the stored values, which may be integers.

        Raises:
          ValueError: The dtype is neither in `DTYPES` nor in `INTEGERS`.
        """
        integers = INTEGERS.get(self.dtype)
        return self.numpy_dtype if integers is None else integers

    def pieces(
        self,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: np.dtype | None = None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Reads the tensor along its leading axis, in pieces of about 32 MiB.

        Args:
          rows: Range of the leading axis, a slice without step; all by default.
          columns: Range of the second axis, a slice without step; all by default. If it covers at
            most half of long rows, only those bytes are read from the file.
          dtype: Dtype of the stored values; None for `numpy_dtype`.

        Yields:
          The slice along the leading axis, and its values [rows, columns, ...].
        """
        if not self.shape:
            raise ValueError(f"{self.name} in {self.file} is a scalar, but must have an axis")
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        dtype = self.numpy_dtype if dtype is None else dtype
        row_bytes = dtype.itemsize * math.prod(self.shape[1:])
        left, width, inside = 0, self.shape[1:2], slice(None)
        if columns is not None:
            left, right, _ = columns.indices(self.shape[1])
            width = (right - left,)
            if row_bytes >= _LONG_ROW and 2 * width[0] <= self.shape[1]:
                left *= row_bytes // self.shape[1]
            else:
                left, width, inside = 0, self.shape[1:2], slice(left, right)
        shape = (*width, *self.shape[2:])
        step = max(1, _PIECE // max(dtype.itemsize * math.prod(shape), 1))
        with self.file.open("rb", buffering=0) as stream:
            for begin in range(first, last, step):
                end = min(begin + step, last)
                piece = np.empty((end - begin, *shape), dtype)
                start = self.start + begin * row_bytes + left
                _read_rows(stream.fileno(), piece, start, row_bytes, self.file)
                yield slice(begin, end), piece[:, inside] if columns is not None else piece


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file and returns its tensors by name.

    Raises:
      ValueError: The safetensors library rejects the file: its header is invalid, or the tensors
        do not cover the file's bytes exactly once.
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
    """Checks a file's header with the safetensors library, without reading tensors.

    Raises:
      ValueError: The library rejects the file.
    """
    size = file.stat().st_size
    if size < 8:
        raise ValueError(f"{file} is not a safetensors file, or is truncated ({size} bytes)")
    try:
        with safetensors.safe_open(file, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a safetensors file, or is truncated or damaged ({size:,} bytes):"
            f" {error}"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor whose array is fetched only when it is written.

    Attributes:
      name: Name of the tensor in the file.
      dtype: Stored dtype.
      shape: Stored shape.
      fetch: Returns the array.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(
    file: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, fetching one tensor at a time.

    The write is atomic: a temporary file is renamed once it is on disk.

    Raises:
      ValueError: A tensor's dtype is neither in `DTYPES` nor in `INTEGERS`, or its array differs
        from its description.
    """
    names = {dtype: name for name, dtype in {**DTYPES, **INTEGERS}.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in names:
            raise ValueError(
                f"{tensor.name} has the dtype {tensor.dtype}, but must have one of"
                f" {', '.join(map(str, names))}"
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
                    f"{tensor.name} is {array.dtype} {array.shape}, but must be {tensor.dtype}"
                    f" {tensor.shape}"
                )
            stream.write(_as_bytes(array))


def _as_bytes(array: np.ndarray) -> memoryview:
    """Returns a view of a contiguous array's bytes; numpy exports no buffer for bfloat16."""
    return array.reshape(-1).view(np.uint8).data


def _read_rows(descriptor: int, piece: np.ndarray, start: int, stride: int, file: Path) -> None:
    """Fills an array from a file; its first row is at `start`, the next `stride` bytes later."""
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
    """Fills a buffer with the file's bytes at offset `start`."""
    while len(view):
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise ValueError(f"{file} is truncated")
        view = view[count:]
        start += count
