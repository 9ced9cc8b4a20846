"""Places host rows on devices, and exchanges values between processes."""

import dataclasses
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from peft_jax.core.typed_settings import differences
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlacement:
    """Shardings of batch rows.

    Attributes:
      rows: Sharding of arrays [rows, ...].
      microbatches: Sharding of arrays [microbatches, rows, ...].
    """

    rows: jax.sharding.NamedSharding
    microbatches: jax.sharding.NamedSharding

    @property
    def parts(self) -> int:
        """Number of shards of the rows.

        Example:
          >>> from peft_jax.parallel import MeshSettings, make_mesh
          >>> mesh = make_mesh(MeshSettings(devices=1))
          >>> rows, microbatches = (
          ...     jax.NamedSharding(mesh, jax.P(*leading, ("data", "fsdp")))
          ...     for leading in ((), (None,)))
          >>> RowPlacement(rows=rows, microbatches=microbatches).parts
          1
        """
        axes = self.rows.spec[0]
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        return math.prod(self.rows.mesh.shape[name] for name in names)

    def put(self, arrays: Any) -> Any:
        """Shards leaves [rows, ...], of which every process has all rows."""
        return jax.tree.map(lambda x: _spread(np.asarray(x), self.rows), arrays)

    def put_microbatches(self, batch: Any, count: int) -> Any:
        """Shards the rows of a step, [count * rows, ...], as microbatches [count, rows, ...]."""
        return jax.tree.map(
            lambda x: _spread(np.reshape(x, (count, -1, *x.shape[1:])), self.microbatches), batch
        )


def _spread(whole: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def from_first(value: Any) -> Any:
    """Broadcasts a JSON value from the first process to all."""
    return gather_json(value)[0]


def gather_json(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([text.size]))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(one[: int(size)]).decode())
        for one, size in zip(texts, np.ravel(sizes), strict=True)
    ]


def check_processes(folder: Path, settings: Mapping[str, Any], *, url: str = "") -> None:
    """Rejects processes that are not connected, or differ in settings or work directory.

    Args:
      folder: Work directory.
      url: URL of a work directory in a bucket, of which each process has a `folder` of its own.
      settings: Configuration of this process, from `RunConfig.to_mapping`.

    Raises:
      RefusedError: The processes are not connected, have different settings, or do not share the
        work directory.
    """
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise RefusedError(
            f"these devices belong to {jax.process_count()} processes that are not connected; start"
            " each with --distributed"
        )
    _check_same(gather_json({**settings, "--workdir": url} if url else settings))
    if not url:
        _check_shared(folder)


def _check_same(given: Sequence[Mapping[str, Any]]) -> None:
    """Rejects settings that differ between processes; `given` has one mapping per process."""
    changed = [differences(given[0], other) for other in given]
    lines = []
    for name in dict.fromkeys(name for one in changed for name in one):
        first = next(one[name][0] for one in changed if name in one)
        holders: dict[str, list[str]] = {}
        for process, one in enumerate(changed):
            value = one[name][1] if name in one else first
            holders.setdefault(json.dumps(value, ensure_ascii=False), []).append(str(process))
        values = "; ".join(f"{value} in process {', '.join(who)}" for value, who in holders.items())
        lines.append(f"  {name}: {values}")
    if lines:
        listing = "\n".join(lines)
        raise RefusedError(
            f"the processes have different settings:\n{listing}\n"
            "Give every process the same --config and the same settings"
        )


def _check_shared(folder: Path) -> None:
    """Rejects a folder in which other processes do not find what the first one writes."""
    token = from_first(uuid.uuid4().hex)
    file = folder / f".processes-{token}"
    if jax.process_index() == 0:
        write_text(file, token)
    multihost_utils.sync_global_devices(f"written {file.name}")
    seen = gather_json(file.is_file())
    if jax.process_index() == 0:
        file.unlink()
    if blind := [process for process, sees in enumerate(seen) if not sees]:
        raise RefusedError(
            f"{folder} is not shared by all processes:"
            f" {', '.join(f'process {process}' for process in blind)} did not find what process 0"
            " wrote. Give a --workdir on a file system that all hosts share: a mounted bucket,"
            " Filestore, NFS"
        )
