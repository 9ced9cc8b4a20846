"""Rows of the host on the devices: each process gives its own, and each device holds its part."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from peft_jax.data import AnyBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlacement:
    """Where rows of a batch go.

    Attributes:
      rows: the sharding of arrays whose leading axis is rows.
      microbatches: the sharding of arrays whose leading axes are microbatches and rows.
    """

    rows: jax.sharding.NamedSharding
    microbatches: jax.sharding.NamedSharding

    def put(self, arrays: Any) -> Any:
        """This process's rows, leaves [rows, ...], as global arrays."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.rows, np.asarray(x)), arrays
        )

    def put_microbatches(self, batch: AnyBatch, count: int) -> AnyBatch:
        """This process's rows of one step, [count * rows, T], as global arrays [count, rows, T]."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                self.microbatches, np.reshape(x, (count, -1, *x.shape[1:]))
            ),
            batch,
        )


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
