"""Logs metrics as JSON lines, to TensorBoard and to Weights & Biases.

A record is a dictionary with "step", "split" ("train" or "held_out") and numbers, lists of numbers
by layer, or dictionaries of those. Values that depend on the clock are under "timing", so that all
others are reproducible.
"""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np

from peft_jax.runtime.files import write_text

Record = dict[str, Any]

TRAIN = "train"
HELD_OUT = "held_out"

_FLUSH_SECONDS = 30.0
"""Maximum delay of TensorBoard events, unless steps take longer."""

_POSITIVE_BINS = 1e-12 * 1.1 ** np.arange(774)
_HISTOGRAM_BINS = np.concatenate([-_POSITIVE_BINS[::-1], [0.0], _POSITIVE_BINS])
"""TensorBoard's own bins: from 1e-12 to 1e20, each 10% wider, and their negatives."""


@runtime_checkable
class Sink(Protocol):
    """Additional destination of records."""

    def write(self, record: Record) -> None:
        """Writes one record."""

    def close(self) -> None:
        """Flushes and closes the destination."""


class MetricsLog:
    """Writes `metrics.jsonl`, one record per line and at most one per step and split.

    Args:
      path: File of metrics.
      from_step: Step that a run resumes from; later records are removed, because their steps are
        taken again. None: a new run with a new file.
      sinks: Additional destinations of records.
      writes: Whether this process writes the file.
      present: The (step, split) of existing records. Default: those in the file.
      held_out: Held-out records of a checkpoint; those missing in the file are written again.

    Attributes:
      found: Number of records in the file up to `from_step`.
      held_out: Held-out records so far, if this process writes the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        from_step: int | None = None,
        sinks: tuple[Sink, ...] = (),
        writes: bool = True,
        present: Iterable[tuple[int, str]] | None = None,
        held_out: Iterable[Record] = (),
    ):
        reads = from_step is not None and present is None
        kept = [r for r in read_records(path) if r["step"] <= from_step] if reads else []
        self.found = len(kept)
        kept = _with_lost(kept, held_out)
        self.held_out = [record for record in kept if record["split"] == HELD_OUT]
        found = ((record["step"], record["split"]) for record in kept)
        self._present = set(found if present is None else present)
        self._sinks = sinks
        self._stream: TextIO | None = None
        if writes:
            write_text(path, "".join(_line(record) for record in kept))
            self._stream = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def present(self) -> list[tuple[int, str]]:
        """Step and split of every record, in order."""
        return sorted(self._present)

    def has(self, step: int, split: str) -> bool:
        """Returns whether there is a record of this step and split."""
        return (step, split) in self._present

    def write(self, record: Record) -> None:
        """Appends a record to the file, and writes it to the sinks."""
        self._present.add((record["step"], record["split"]))
        if self._stream is None:
            return
        if record["split"] == HELD_OUT:
            self.held_out.append(plain(record))
        self._stream.write(_line(record))
        self._stream.flush()
        for sink in self._sinks:
            sink.write(record)

    def sync(self) -> None:
        """Waits until every record is on disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file and the sinks."""
        if self._stream is not None:
            self._stream.close()
        for sink in self._sinks:
            sink.close()


def read_records(path: Path) -> list[Record]:
    """Returns the records of a metrics file, without a truncated last line; empty without a file.

    Raises:
      ValueError: A line before the last is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            if type(record["step"]) is not int or not isinstance(record["split"], str):
                raise ValueError("step must be an integer and split a string")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not a record: {line[:80].decode(errors='replace')!r}"
            ) from error
        records.append(record)
    return records


def plain(tree: Any) -> Any:
    """Converts arrays to numbers and nested lists for JSON; non-finite values become None.

    Example:
      >>> plain({"loss": np.float32(0.5), "by_layer": np.array([1.0, np.nan])})
      {'loss': 0.5, 'by_layer': [1.0, None]}
    """
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    return plain(np.asarray(tree).tolist())


def _with_lost(kept: list[Record], held_out: Iterable[Record]) -> list[Record]:
    """Returns records with the missing ones of `held_out`, in order."""
    present = {(record["step"], record["split"]) for record in kept}
    lost = [record for record in held_out if (record["step"], record["split"]) not in present]
    if not lost:
        return kept
    return sorted([*kept, *lost], key=lambda record: (record["step"], record["split"] != TRAIN))


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record by path, and the mean of each list.

    Example:
      >>> record = {"step": 1, "split": "train", "loss": 2.0, "lambda": {"layers": [0.25, 0.75]}}
      >>> dict(scalars(record))
      {'train/loss': 2.0, 'train/lambda/layers': 0.5}
    """
    for name, value in _leaves(record):
        numbers = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        if numbers:
            yield f"{record['split']}/{name}", float(np.mean(numbers))


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif prefix or name not in ("step", "split"):
            yield f"{prefix}{name}", value


class TensorBoard:
    """Writes records as TensorBoard events; lists by layer as their mean and a histogram.

    Events are written synchronously, because the thread of tensorboardX's own writer dies on a full
    disk, and the run would wait for it forever.

    Args:
      folder: Folder of the event files.
      from_step: Step that a run resumes from; TensorBoard hides later events.
    """

    def __init__(self, folder: Path, *, from_step: int | None = None):
        # Imported late, because the import is slow and few runs need it.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        self._flushed = -math.inf  # flushes the first record at once
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        if from_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=from_step + 1, session_log=start)

    def write(self, record: Record) -> None:
        """Writes one record as events."""
        from tensorboardX import summary

        plain_record = plain(record)
        for name, value in scalars(plain_record):
            self._add(step=record["step"], summary=summary.scalar(name, value))
        for name, value in _leaves(plain_record):
            if isinstance(value, list) and None not in value:
                tag = f"{record['split']}/{name}/by_layer"
                histogram = summary.histogram(tag, np.asarray(value), _HISTOGRAM_BINS)
                self._add(step=record["step"], summary=histogram)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the event file."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._file.write(event.SerializeToString())


class WeightsAndBiases:
    """Logs records to a Weights & Biases run, which a resumed run continues.

    Args:
      project: Name of the project.
      name: Name of the run.
      config: Configuration of the run.
      folder: Work directory, which holds the client's files and the id of the run.
    """

    def __init__(self, *, project: str, name: str, config: Mapping[str, Any], folder: Path):
        import wandb

        id_file = folder / "wandb-run-id"
        if not id_file.is_file():
            write_text(id_file, uuid.uuid4().hex)
        run_id = id_file.read_text(encoding="utf-8").strip()
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=name,
            config=dict(config),
            dir=str(folder),
            resume="allow",
        )

    def write(self, record: Record) -> None:
        """Logs one record's numbers."""
        self._run.log(dict(scalars(plain(record))), step=record["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
