"""What a run measures, as lines of JSON, and from there to TensorBoard and Weights & Biases.

A record is a dictionary with "step", "split" ("train" or "held_out") and numbers, lists of numbers
by layer, or dictionaries of those. What depends on the clock stands under "timing", so that
everything else is the same each time the same run is made.
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
"""The most that TensorBoard lags behind, unless steps take longer."""

_POSITIVE_BINS = 1e-12 * 1.1 ** np.arange(774)
_HISTOGRAM_BINS = np.concatenate([-_POSITIVE_BINS[::-1], [0.0], _POSITIVE_BINS])
"""TensorBoard's own bins: from 1e-12 to 1e20 in steps of a tenth, and as many below zero."""


@runtime_checkable
class Sink(Protocol):
    """Somewhere else that records go."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Writes out what is left."""


class MetricsLog:
    """`metrics.jsonl`, a line a record, with each step and split once.

    Args:
      path: the file.
      from_step: the step a run goes on from; later records are of work that is done again, and are
        taken out. None: the run begins, and the file with it.
      sinks: where else records go.
      writes: whether this process writes the file; otherwise it only knows what is in it.
      present: the (step, split) of the records there are, where they are known; by default they are
        read from the file.
      held_out: records of held-out data that belong there, as a checkpoint keeps them; those that
        the file has lost are written again.

    Attributes:
      found: Number of records that were in the file, up to `from_step`.
      held_out: The records of held-out data so far, where this process writes the file.
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
        """The step and split of every record there is, in order."""
        return sorted(self._present)

    def has(self, step: int, split: str) -> bool:
        """Whether there is such a record already."""
        return (step, split) in self._present

    def write(self, record: Record) -> None:
        """Appends a record, and hands it to the sinks; it is in the file when this returns."""
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
        """Returns once every record is on disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file and the sinks."""
        if self._stream is not None:
            self._stream.close()
        for sink in self._sinks:
            sink.close()


def read_records(path: Path) -> list[Record]:
    """The records of a metrics file, without a last line that was cut short; none without a file.

    Raises:
      ValueError: a line before the last is not a record.
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
                raise ValueError("a step is a number, and a split a name")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not a record of a run: {line[:80].decode(errors='replace')!r}"
            ) from error
        records.append(record)
    return records


def plain(tree: Any) -> Any:
    """Arrays as numbers and nested lists; what is not finite as None, which JSON can hold.

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
    """Returns records in their order with those of `held_out` that are not among them."""
    present = {(record["step"], record["split"]) for record in kept}
    lost = [record for record in held_out if (record["step"], record["split"]) not in present]
    if not lost:
        return kept
    return sorted([*kept, *lost], key=lambda record: (record["step"], record["split"] != TRAIN))


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record by path, and the mean of each list.

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
    """Records as TensorBoard events: numbers, and lists by layer as their mean and a histogram.

    Events are written as they come. tensorboardX's own writer hands them to a thread, which dies
    on a full disk, and the run then waits for it forever.

    Args:
      folder: where the event files go.
      from_step: the step a run goes on from; TensorBoard hides what was written later.
    """

    def __init__(self, folder: Path, *, from_step: int | None = None):
        # Imported here: only runs that write events pay for it.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        self._flushed = -math.inf  # so that the first record can be seen at once
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
    """Records as a Weights & Biases run, which goes on where the same run was stopped.

    Args:
      project: the project's name there.
      name: what the run is called.
      config: the run's configuration, shown beside it.
      folder: the work directory, where the client keeps its files; who goes on with it goes on
        with the same run.
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
