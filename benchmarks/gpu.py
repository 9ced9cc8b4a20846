"""On a GPU: kernels beside the copy bandwidth measured in the same run, and training steps.

    python -m benchmarks.gpu

First it checks each kernel's numbers against the reference, and ends with an error if they are
wrong. Then it times, in turn: a copy of the activations, the rotation and the unitary product in
each implementation that the platform has. What counts is the share of the copy's bandwidth, each
product counted as one read and one write of the activations. Then `benchmarks.run` compares
training steps: BOFT's with LoRA's, and with Hugging Face PEFT's on the same GPU (which needs a
torch with CUDA).

It was written without a GPU to run it on; on a CPU it runs with `--tokens 256 --widths 512`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import ROOT
from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.block_rotation import reference as rotation_reference
from kernels_pallas.cases import tolerance
from kernels_pallas.dispatch import KernelError
from kernels_pallas.unitary import unitary_product

BLOCK_SIZE = 16
Run = Callable[[], Any]


def rotation_arrays(tokens: int, d: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, g) in bfloat16 and orthogonal blocks in float32."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, d)), jnp.bfloat16) for _ in range(2))
    blocks = np.linalg.qr(rng.normal(size=(d // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)))[0]
    return x, g, jnp.asarray(blocks, jnp.float32)


def check_numbers(implementation: str) -> None:
    """Raises RuntimeError unless the rotation and its gradients are the reference's."""
    x, g, blocks = rotation_arrays(200, 512)
    blocks = blocks.astype(jnp.bfloat16).astype(jnp.float32)  # what the product rounds them to
    y, transpose = jax.vjp(lambda *a: block_rotation(*a, implementation=implementation), x, blocks)
    found = y, *transpose(g)
    arrays = [np.asarray(a, np.float64) for a in (x, g, blocks)]
    expected = (
        rotation_reference.forward(arrays[0], arrays[2]),
        *rotation_reference.backward(*arrays),
    )
    for name, one, wanted in zip(("y", "dx", "dblocks"), found, expected, strict=True):
        error = np.abs(np.asarray(one, np.float64) - wanted).max() / np.abs(wanted).max()
        if error > 2 * tolerance(jnp.bfloat16, len(x)):
            raise RuntimeError(f"{implementation}: {name} of the rotation is off by {error:.1e}")


def programs(tokens: int, d: int, implementations: list[str]) -> dict[str, tuple[Run, int]]:
    """By name: what to run, and how many arrays of the activations' size it must move."""
    x, g, blocks = rotation_arrays(tokens, d)
    phases = jnp.zeros((3, d // 2), jnp.float32)
    reflections = jnp.ones((2, 2, d // 2), jnp.float32)
    made: dict[str, tuple[Run, int]] = {"copy": (_compiled(lambda x: x + 1, x), 2)}
    for name in implementations:

        def rotate(x: jax.Array, blocks: jax.Array, name: str = name) -> jax.Array:
            return block_rotation(x, blocks, implementation=name)

        def turn(x: jax.Array, *parameters: jax.Array, name: str = name) -> jax.Array:
            return unitary_product(x, *parameters, implementation=name)

        for kernel, function, parameters in (
            ("rotation", rotate, (blocks,)),
            ("unitary", turn, (phases, reflections)),
        ):
            try:
                forwards = _compiled(function, x, *parameters)
                backwards = _compiled(_gradients(function), x, g, *parameters)
            except KernelError as error:
                print(f"{kernel} {name}: {error}", file=sys.stderr)
                continue
            made[f"{kernel} {name} forwards"] = forwards, 2
            made[f"{kernel} {name} backwards"] = backwards, 3
    return made


def _gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda x, g, *parameters: jax.vjp(function, x, *parameters)[1](g)


def _compiled(function: Callable[..., Any], *arrays: jax.Array) -> Run:
    compiled = jax.jit(function).lower(*arrays).compile()
    return lambda: compiled(*arrays)


def time_in_turn(runs: dict[str, tuple[Run, int]], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds of one run of each, the median over rounds; runs are queued, so that none waits."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = run()
            jax.block_until_ready(result)
            if round_:  # the first warms up
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Checks, times and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192, 14336])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", action="store_true", help="also compare training steps")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    device = jax.devices()[0]
    implementations = ["xla"] if device.platform == "cpu" else ["xla", "pallas"]
    for name in implementations:
        check_numbers(name)
    lines = [
        f"{device.device_kind}, {options.tokens} tokens, bfloat16, blocks of {BLOCK_SIZE}.",
        "",
        "| d | | µs | GB/s | of the copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = []
    for d in options.widths:
        runs = programs(options.tokens, d, implementations)
        seconds = time_in_turn(runs, options.rounds, options.repeats)
        moved = {name: arrays * options.tokens * d * 2 for name, (_, arrays) in runs.items()}
        rates = {name: moved[name] / seconds[name] for name in runs}
        for name, rate in rates.items():
            share = rate / rates["copy"]
            lines.append(
                f"| {d} | {name} | {1e6 * seconds[name]:.1f} | {rate / 1e9:.0f} | {share:.2f} |"
            )
            rows.append({"d": d, "name": name, "seconds": seconds[name], "of_copy": share})
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.md").write_text("\n".join(lines) + "\n")
    (options.output / "gpu.json").write_text(json.dumps(rows))
    print("\n".join(lines))
    if options.steps:
        command = [sys.executable, "-m", "benchmarks.run", "--only", "boft", "boft_lora"]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
