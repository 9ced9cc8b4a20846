"""On a GPU: kernels beside the copy bandwidth measured in the same run, and training steps.

    python -m benchmarks.gpu --steps

First each kernel's numbers are checked against the references, at several shapes. Then it times, in
turn: a copy of the activations, the rotation and the unitary product in each implementation that
the GPU has. What counts is the share of the copy's bandwidth, each product counted as one read and
one write of the activations. With `--steps` training steps are compared too, in bfloat16, of a
Llama of 1.2 billion parameters: BOFT's with LoRA's, and with Hugging Face PEFT's BOFT on the same
GPU (which needs a torch with CUDA). Each figure stands beside its target, and the exit code is 1 if
one is missed.

It was written without a GPU to run it on. `--on_cpu` runs it on a CPU, where a copy's bandwidth
says little and no figure decides the exit code; take few tokens then (`--tokens 256 --widths 512`).
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import Comparison, compare, table
from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.block_rotation import reference as rotation_reference
from kernels_pallas.cases import tolerance
from kernels_pallas.dispatch import KernelError
from kernels_pallas.unitary import reference as unitary_reference
from kernels_pallas.unitary import unitary_product
from peft_jax import exits

BLOCK_SIZE = 16
SHARE_OF_COPY = 0.8
"""The least share of the copy's bandwidth, of the rotation and of the unitary product."""
BOFT_OF_LORA = 1.15
BOFT_OF_PEFT = 0.2
"""The most that our BOFT step may take of our LoRA step, and of PEFT's BOFT step."""

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
      name: what was measured.
      shown: in words, for the table.
      value: the number.
      met: whether it reaches its target; None if it has none.
    """

    name: str
    shown: str
    value: float
    met: bool | None = None


def rotation_arrays(tokens: int, d: int, block_size: int) -> tuple[jax.Array, ...]:
    """(x, g) in bfloat16 and orthogonal blocks in float32."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, d)), jnp.bfloat16) for _ in range(2))
    blocks = np.linalg.qr(rng.normal(size=(d // block_size, block_size, block_size)))[0]
    return x, g, jnp.asarray(blocks, jnp.float32)


def unitary_arrays(tokens: int, d: int) -> tuple[jax.Array, ...]:
    """(x, g) in bfloat16, and phases and reflections in float32."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, d)), jnp.bfloat16) for _ in range(2))
    phases, reflections = rng.normal(size=(3, d // 2)), rng.normal(size=(2, 2, d // 2))
    return x, g, jnp.asarray(phases, jnp.float32), jnp.asarray(reflections, jnp.float32)


def check_numbers(implementation: str) -> None:
    """Compares both products and their gradients with the references.

    Raises:
      RuntimeError: one is off.
      KernelError: there is no such implementation of the rotation here.
    """
    for tokens, block_size in ((64, 16), (200, 16), (201, 128), (3, 128)):
        x, g, blocks = rotation_arrays(tokens, 512, block_size)
        # As the product rounds them.
        blocks = blocks.astype(jnp.bfloat16).astype(jnp.float32)
        _check(implementation, block_rotation, rotation_reference, x, g, blocks)
    try:
        _check(implementation, unitary_product, unitary_reference, *unitary_arrays(200, 512))
    except KernelError as error:
        print(f"the unitary product was not checked: {error}", file=sys.stderr)


def _check(
    implementation: str,
    product: Callable[..., jax.Array],
    reference: Any,
    x: jax.Array,
    g: jax.Array,
    *parameters: jax.Array,
) -> None:
    y, transpose = jax.vjp(lambda *a: product(*a, implementation=implementation), x, *parameters)
    found = y, *transpose(g)
    given = [np.asarray(a, np.float64) for a in (x, g, *parameters)]
    expected = reference.forward(given[0], *given[2:]), *reference.backward(*given)
    for index, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(np.asarray(one, np.float64) - wanted).max() / np.abs(wanted).max()
        if error > 2 * tolerance(jnp.bfloat16, len(x)):
            raise RuntimeError(
                f"{product.__name__} as {implementation!r} of {x.shape} and"
                f" {[p.shape for p in parameters]}: result {index} is off by {error:.1e}"
            )


def programs(tokens: int, d: int, implementations: list[str]) -> dict[str, tuple[Run, int]]:
    """By name: what to run, and how many arrays of the activations' size it must move."""
    x, g, blocks = rotation_arrays(tokens, d, BLOCK_SIZE)
    parameters = unitary_arrays(1, d)[2:]
    made: dict[str, tuple[Run, int]] = {"copy": (_compiled(lambda x: x + 1, x), 2)}
    for name in implementations:
        for kernel, product, arrays in (
            ("rotation", block_rotation, (blocks,)),
            ("unitary", unitary_product, parameters),
        ):

            def function(*a: jax.Array, product: Any = product, name: str = name) -> jax.Array:
                return product(*a, implementation=name)

            try:
                forwards = _compiled(function, x, *arrays)
                backwards = _compiled(_gradients(function), x, g, *arrays)
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


def measure_kernels(options: argparse.Namespace, implementations: list[str]) -> list[Figure]:
    """The products' shares of the copy's bandwidth; the best implementation of each is judged."""
    figures = []
    for d in options.widths:
        runs = programs(options.tokens, d, implementations)
        seconds = time_in_turn(runs, options.rounds, options.repeats)
        rates = {
            name: arrays * options.tokens * d * 2 / seconds[name]
            for name, (_, arrays) in runs.items()
        }
        best: dict[tuple[str, str], float] = {}
        for name, rate in rates.items():
            share = rate / rates["copy"]
            shown = f"{1e6 * seconds[name]:.1f} µs, {rate / 1e9:.0f} GB/s, {share:.2f} of the copy"
            figures.append(Figure(f"d {d}, {name}", shown, share))
            if name != "copy":
                kernel, _, direction = name.split()
                best[kernel, direction] = max(best.get((kernel, direction), 0.0), share)
        figures += [
            _judged(f"d {d}, {' '.join(key)}, the best", share, at_least=SHARE_OF_COPY)
            for key, share in best.items()
        ]
    return figures


def measure_steps(kernels: str, size: str) -> tuple[list[Comparison], list[Figure]]:
    """BOFT's training step beside LoRA's and PEFT's."""
    both = ("--size", size, "--dtype", "bfloat16")
    ours = ("benchmarks.step_ours", "boft", *both, "--kernels", kernels)
    lora = ("benchmarks.step_ours", "lora", *both)
    theirs = ("benchmarks.step_peft", "boft", *both)
    done, figures = [], []
    for name, other, bound in (
        ("BOFT b 8, m 2 / our LoRA r 8", lora, BOFT_OF_LORA),
        ("BOFT b 8, m 2 / PEFT BOFT b 8, m 1", theirs, BOFT_OF_PEFT),
    ):
        print(f"{name} …", file=sys.stderr, flush=True)
        done.append(compare(name, ours, other, rounds=5, steps=5))
        figures.append(_judged(f"step, {name}", done[-1].ratio, at_most=bound))
    return done, figures


def _judged(
    name: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> Figure:
    if at_least is not None:
        return Figure(name, f"{value:.2f}, to be {at_least} at least", value, value >= at_least)
    assert at_most is not None
    return Figure(name, f"{value:.2f}, to be {at_most} at most", value, value <= at_most)


@exits.command("benchmarks.gpu")
def main() -> int:
    """Checks, times, compares and judges."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192, 14336])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", action="store_true", help="also compare training steps")
    parser.add_argument("--on_cpu", action="store_true", help="try it out without a GPU")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    if platform != "gpu" and not options.on_cpu:
        parser.error(
            f"this measures a GPU, and JAX has found a {platform} ({kind}): install the extra 'gpu'"
            " on a machine with one, or try it out with --on_cpu --tokens 256 --widths 512"
        )
    implementations = []
    for name in ("xla", "pallas"):
        try:
            check_numbers(name)
            implementations.append(name)
        except KernelError as error:
            print(f"{name}: {error}", file=sys.stderr)
    figures = measure_kernels(options, implementations)
    lines = [f"{kind}, {options.tokens} tokens, bfloat16, blocks of {BLOCK_SIZE}."]
    if options.steps:
        size = "large" if platform == "gpu" else "small"
        comparisons, judged = measure_steps(implementations[-1], size)
        figures += judged
        lines += ["", table(comparisons)]
    words = {None: "", True: "yes", False: "**no**"}
    lines += ["", "| | | met |", "| --- | --- | --- |"]
    lines += [f"| {f.name} | {f.shown} | {words[f.met]} |" for f in figures]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.md").write_text("\n".join(lines) + "\n")
    (options.output / "gpu.json").write_text(
        json.dumps([dataclasses.asdict(figure) for figure in figures])
    )
    print("\n".join(lines))
    return int(platform == "gpu" and any(figure.met is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
