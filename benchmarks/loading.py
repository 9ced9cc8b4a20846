"""Measures peak memory and time of loading a checkpoint, compared with a plain copy of it.

    python -m benchmarks.loading --gib=4

It writes a synthetic Llama checkpoint in files of half a gigabyte to a temporary folder, and loads
it in separate processes: on one host, on two hosts with half of every kernel each, quantized, and
converted first. Before each, it copies the same files and drops them from the page cache, so that
both read from the disk.

Peak memory is the largest resident set during loading, minus that before. The share is the memory
that the process's devices hold at the end.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

GIB = 2**30

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Llama 3 8B with a small vocabulary: 0.41 GiB per layer in bfloat16."""

LAYER_GIB = 0.406


@exits.command("benchmarks.loading")
def main() -> None:
    """Runs everything and prints a table."""
    parser = Arguments("benchmarks.loading", description=__doc__)
    parser.add_argument(
        "--gib", type=float, default=4.0, help="the checkpoint's approximate size in GiB"
    )
    parser.add_argument("--folder", default=None, help="where the temporary folder is made")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(*options.worker)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint, converted = Path(folder, "checkpoint"), Path(folder, "converted")
        size = _make(checkpoint, layers=max(1, round(options.gib / LAYER_GIB)))
        rows = [
            _measure("whole, bfloat16", checkpoint, quantization="none"),
            _measure("each of 2 hosts, bfloat16", checkpoint, quantization="none", hosts=2),
            _measure("each of 2 hosts, int8", checkpoint, quantization="int8", hosts=2),
            _measure("each of 2 hosts, nf4", checkpoint, quantization="nf4", hosts=2),
            _convert(checkpoint, converted),
            _measure(
                "each of 2 hosts, bfloat16, converted",
                converted,
                quantization="none",
                hosts=2,
                copied=checkpoint,
            ),
        ]
    text = f"A checkpoint of {size / GIB:.2f} GiB; {os.cpu_count()} cores.\n\n{_table(rows)}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "loading.md").write_text(text)
    print(text)


def _make(folder: Path, *, layers: int) -> int:
    """Writes a checkpoint of random weights, and returns its number of bytes."""
    from peft_jax.core import flatten, unflatten
    from peft_jax.hub.save import save_model
    from peft_jax.models import build_model

    model = build_model({**CONFIG, "num_hidden_layers": layers})
    shapes = flatten(model.abstract_params("bfloat16"))
    largest = max(int(np.prod(leaf.shape[1:])) for leaf in shapes.values())
    drawn = np.random.default_rng(0).normal(0.0, 0.02, largest).astype(np.float32)
    drawn = drawn.astype(next(iter(shapes.values())).dtype)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        # All layers share their weights, so that the checkpoint needs little memory.
        one = drawn[: int(np.prod(shape[1:]))].reshape(shape[1:])
        return np.broadcast_to(one, shape)

    params = {path: leaf(shape.shape) for path, shape in shapes.items()}
    save_model(folder, model, unflatten(params), max_shard_bytes=GIB // 2)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _forget(folder: Path) -> None:
    """Drops files from the page cache, so that they are read from the disk again."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(folder: Path) -> float:
    """Returns the seconds of a plain copy of the files on the same disk."""
    _forget(folder)
    target = folder.with_name("copy")
    began = time.perf_counter()
    shutil.copytree(folder, target)
    for file in target.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def _measure(
    name: str, folder: Path, *, quantization: str, hosts: int = 1, copied: Path | None = None
) -> dict[str, Any]:
    copy_seconds = _copy(copied or folder)
    _forget(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.loading", "--worker"),
                *(str(folder), quantization, str(port), str(hosts), str(index)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(hosts)
    ]
    found = []
    for worker in workers:
        said, _ = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"{name}: a worker ended with code {worker.returncode}")
        found.append(json.loads(said.splitlines()[-1]))
    worst = max(found, key=lambda one: one["peak"] - one["share"])
    return {
        "name": name,
        "share": worst["share"],
        "peak": worst["peak"],
        "read": max(one["read"] for one in found),
        "seconds": max(one["seconds"] for one in found),
        "copy": copy_seconds,
    }


def _work(folder: str, quantization: str, port: str, hosts: str, index: str) -> None:
    """Loads one host's share in a separate process, and prints its cost."""
    import jax

    if int(hosts) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(hosts), int(index))
    from peft_jax.hub import load_model
    from peft_jax.parallel import MeshSettings, make_mesh, sharding_tree

    mesh = make_mesh(MeshSettings(fsdp=-1, data=1))

    def shardings(model: Any) -> Any:
        return sharding_tree(
            model.logical_axes(quantization),
            mesh,
            shapes=model.abstract_params("bfloat16", quantization),
        )

    jax.block_until_ready(jax.numpy.zeros(1))
    before, read_before = _reset_peak(), _bytes_read()
    began = time.perf_counter()
    _, params = load_model(folder, dtype="bfloat16", quantization=quantization, sharding=shardings)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    share = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    peak = _status("VmHWM") - before
    found = {"share": share, "peak": peak, "read": _bytes_read() - read_before, "seconds": seconds}
    print(json.dumps(found), flush=True)


def _convert(checkpoint: Path, out: Path) -> dict[str, Any]:
    copy_seconds = _copy(checkpoint)
    _forget(checkpoint)
    script = (
        "import sys, time, json\n"
        "from benchmarks.loading import _reset_peak, _status, _bytes_read\n"
        "from peft_jax.convert import convert_checkpoint\n"
        "before, read = _reset_peak(), _bytes_read()\n"
        "began = time.perf_counter()\n"
        "convert_checkpoint(*sys.argv[1:])\n"
        "print(json.dumps({'peak': _status('VmHWM') - before, 'read': _bytes_read() - read,"
        " 'seconds': time.perf_counter() - began}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(out)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    found = json.loads(result.stdout.splitlines()[-1])
    return {"name": "peft_jax.convert", "share": 0, "copy": copy_seconds, **found}


def _reset_peak() -> int:
    """Resets the peak of the resident set, and returns its current bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| | share, GiB | peak beyond the share, GiB | read, GiB | seconds | plain copy, seconds |"
        " ratio |\n| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(
        f"| {row['name']} | {row['share'] / GIB:.2f} | {(row['peak'] - row['share']) / GIB:.2f} |"
        f" {row['read'] / GIB:.2f} | {row['seconds']:.1f} | {row['copy']:.1f} |"
        f" {row['seconds'] / row['copy']:.2f} |"
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
