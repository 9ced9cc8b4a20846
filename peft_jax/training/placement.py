"""Rows of the host on the devices that hold them, and what processes tell each other."""

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
    """Where rows of a batch go.

    Attributes:
      rows: the sharding of arrays whose leading axis is rows.
      microbatches: the sharding of arrays whose leading axes are microbatches and rows.
    """

    rows: jax.sharding.NamedSharding
    microbatches: jax.sharding.NamedSharding

    @property
    def parts(self) -> int:
        """Number of parts that rows are sharded into.

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
        """Rows, leaves [rows, ...] that every process has whole, each on the device it belongs to.

        A process hands over what its own devices hold, whatever the mesh.
        """
        return jax.tree.map(lambda x: _spread(np.asarray(x), self.rows), arrays)

    def put_microbatches(self, batch: Any, count: int) -> Any:
        """The rows of one step, [count * rows, T], as arrays [count, rows, T]; see `put`."""
        return jax.tree.map(
            lambda x: _spread(np.reshape(x, (count, -1, *x.shape[1:])), self.microbatches), batch
        )


def _spread(whole: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def from_first(value: Any) -> Any:
    """What the first process has, in all of them; for what JSON can hold."""
    return gather_json(value)[0]


def gather_json(value: Any) -> list[Any]:
    """What every process has, in the order of the processes; for what JSON can hold."""
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


def check_processes(folder: Path, settings: Mapping[str, Any]) -> None:
    """Whether the processes of a run have met, are asked for the same, and see its work directory.

    Args:
      folder: the work directory.
      settings: this process's configuration, as `RunConfig.to_mapping` gives it.

    Raises:
      RefusedError: they have not, are not, or do not.
    """
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise RefusedError(
            f"these devices belong to {jax.process_count()} processes, which have not met: start"
            " each with --distributed"
        )
    _check_same(gather_json(settings))
    _check_shared(folder)


def _check_same(given: Sequence[Mapping[str, Any]]) -> None:
    """Every process has to compute the same; `given` are their settings, in their order."""
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
            f"the processes are given different settings:\n{listing}\n"
            "Give every process the same --config and the same settings"
        )


def _check_shared(folder: Path) -> None:
    """Every process has to find what the first one writes."""
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
            f"{folder} is not the same folder in every process: what process 0 writes there,"
            f" {', '.join(f'process {process}' for process in blind)} did not find. Give a"
            " --workdir on a file system that all hosts share: a mounted bucket, Filestore, NFS"
        )
