"""Benchmarks a GPU: kernels, attention, experts, training steps and generation.

    python -m benchmarks.gpu

It first checks each kernel against its reference, at several shapes. Then it times:

- A copy of activations, and the rotation and the unitary product in each implementation. The result
  is the share of the copy's bandwidth, counting one read and one write of the activations.
- Attention in each implementation, forward and with gradients.
- The grouped products of a mixture of experts, relative to one dense product of as many operations.
- Training steps in bfloat16, compared with Hugging Face PEFT on the same GPU (which needs torch
  with CUDA): LoRA, BOFT and full fine-tuning of a Llama of 1.1 billion parameters, the hybrid, LoRA
  over an int8 base model, and LoRA at the widths of Llama 3 8B. The steps of a group run in turn.
  Utilization is relative to the vendor's bfloat16 peak, without rematerialization: 4 or 6
  operations per parameter and token, causal attention, and nothing for adapters.
- Greedy generation, compared with transformers.

`--only` selects parts. Some figures have a target, and the exit code is 1 if one is missed.
`--on_cpu` tries the benchmark on a CPU, where no figure has a target. Use few tokens there
(`--tokens 256 --widths 512 --experts 8x64x64 --only kernels experts`).
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import small_llama
from benchmarks.compare import Comparison, Side, run_in_turn, table
from benchmarks.experts import DENSE, check_grouped_products, grouped_products
from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.block_rotation import reference as rotation_reference
from kernels_pallas.dispatch import KernelError
from kernels_pallas.shared_cases import tolerance
from kernels_pallas.unitary import reference as unitary_reference
from kernels_pallas.unitary import unitary_product
from peft_jax.cost.chips import find_chip
from peft_jax.models.attention import dense_attention
from peft_jax.models.attention_layout import AttentionLayout
from peft_jax.models.chunked_attention import chunked_attention
from peft_jax.models.fused_attention import fused_attention
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

PARTS = ("kernels", "attention", "experts", "steps", "generation")
"""Parts of the benchmark, in order."""
BLOCK_SIZE = 16
SHARE_OF_COPY = 0.8
"""Minimum share of the copy's bandwidth for rotation and unitary product."""
BOFT_OF_LORA = 1.1
BOFT_OF_PEFT = 1 / 6
"""Maximum ratios of our BOFT step to our LoRA step, and to PEFT's BOFT step."""
HYBRID_OF_LORA = 1.1
LORA_OF_PEFT = 0.7
FULL_OF_PEFT = 0.8
GENERATION_OF_TRANSFORMERS = 1 / 3
"""Maximum ratios of our time to the other side's, for the other comparisons."""

OURS, THEIRS = "benchmarks.step_ours", "benchmarks.step_peft"
BF16 = ("--dtype", "bfloat16")
LARGE = ("--size", "large", *BF16)
SCANNED = ("--scan_layers",)
STEPS = (
    (
        {
            "LoRA": (OURS, "lora", *LARGE, *SCANNED),
            "BOFT": (OURS, "boft", *LARGE, *SCANNED),
            "PEFT LoRA": (THEIRS, "lora", *LARGE),
            "PEFT BOFT": (THEIRS, "boft", *LARGE),
        },
        (
            ("LoRA", "PEFT LoRA", LORA_OF_PEFT),
            ("BOFT", "PEFT BOFT", BOFT_OF_PEFT),
            ("BOFT", "LoRA", BOFT_OF_LORA),
        ),
    ),
    (
        {
            "LoRA": (OURS, "lora", *LARGE, *SCANNED),
            "hybrid": (OURS, "hybrid", *LARGE, *SCANNED),
            "LoRA, int8 base": (OURS, "lora", *LARGE, *SCANNED, "--quantization", "int8"),
        },
        (("hybrid", "LoRA", HYBRID_OF_LORA),),
    ),
    (
        {"full": (OURS, "full", *LARGE, *SCANNED), "PEFT full": (THEIRS, "full", *LARGE)},
        (("full", "PEFT full", FULL_OF_PEFT),),
    ),
    (
        {
            "LoRA, 8B": (OURS, "lora", "--size", "8b", *BF16, *SCANNED),
            "PEFT LoRA, 8B": (THEIRS, "lora", "--size", "8b", *BF16),
        },
        (("LoRA, 8B", "PEFT LoRA, 8B", LORA_OF_PEFT),),
    ),
)
"""Groups of workers that run in turn, and their comparisons: two names and the maximum ratio.

Only one group is on the GPU at a time, because its memory does not hold all.
"""

GENERATION = {
    "generation": ("benchmarks.generate_ours", "generate", *LARGE),
    "transformers": ("benchmarks.generate_transformers", "generate", *LARGE),
}
ATTENTION = {"dense": dense_attention, "chunked": chunked_attention, "fused": fused_attention}
ATTENTION_SIZES = ((8, 1024, 8, 4, 64), (2, 4096, 8, 4, 128))
"""Rows, tokens, key-value heads, query heads per key-value head, head dimension."""

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
      name: Name of the measurement.
      shown: Text for the table.
      value: Measured value.
      met: Whether it reaches its target; None without a target.
    """

    name: str
    shown: str
    value: float
    met: bool | None = None


class Report:
    """Collects figures and writes them after every addition, because a run may be interrupted.

    Args:
      folder: Folder of `gpu.md` and `gpu.json`.
      title: First line of the report.
    """

    def __init__(self, folder: Path, title: str):
        self._folder = folder
        self._lines = [title]
        self.figures: list[Figure] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.add(*_HEADING)

    def add(self, *lines: str) -> None:
        """Adds lines of Markdown."""
        self._lines += lines
        print("\n".join(lines), flush=True)
        (self._folder / "gpu.md").write_text("\n".join(self._lines) + "\n")

    def judge(self, *figures: Figure) -> None:
        """Adds rows of figures."""
        words = {None: "", True: "yes", False: "**no**"}
        self.figures += figures
        self.add(*(f"| {f.name} | {f.shown} | {words[f.met]} |" for f in figures))
        listed = [dataclasses.asdict(figure) for figure in self.figures]
        (self._folder / "gpu.json").write_text(json.dumps(listed))


_HEADING = ("", "| | | met |", "| --- | --- | --- |")


def rotation_arrays(tokens: int, d: int, block_size: int) -> tuple[jax.Array, ...]:
    """Returns x and g in bfloat16, and orthogonal blocks in float32."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, d)), jnp.bfloat16) for _ in range(2))
    blocks = np.linalg.qr(rng.normal(size=(d // block_size, block_size, block_size)))[0]
    return x, g, jnp.asarray(blocks, jnp.float32)


def unitary_arrays(tokens: int, d: int) -> tuple[jax.Array, ...]:
    """Returns x and g in bfloat16, and phases and reflections in float32."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, d)), jnp.bfloat16) for _ in range(2))
    phases, reflections = rng.normal(size=(3, d // 2)), rng.normal(size=(2, 2, d // 2))
    return x, g, jnp.asarray(phases, jnp.float32), jnp.asarray(reflections, jnp.float32)


def check_numbers(implementation: str) -> None:
    """Compares both products and their gradients with the references.

    Raises:
      RuntimeError: A result differs from its reference.
      KernelError: The rotation has no such implementation on this device.
    """
    for tokens, block_size in ((64, 16), (200, 16), (201, 128), (3, 128)):
        x, g, blocks = rotation_arrays(tokens, 512, block_size)
        # The product rounds blocks to bfloat16.
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
    """Returns, by name, a compiled program and its number of activation-sized reads and writes."""
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
    """Returns the median seconds of each run over rounds; runs are queued without waiting."""
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


def measure_kernels(options: argparse.Namespace, report: Report) -> None:
    """Measures each product's share of the copy's bandwidth, and judges the best implementation.

    Only the largest number of tokens is judged, because a small copy takes as long as its launch.
    """
    implementations = checked_implementations()
    for tokens in options.tokens:
        for d in options.widths:
            where = f"{tokens} x {d}"
            runs = programs(tokens, d, implementations)
            seconds = time_in_turn(runs, options.rounds, options.repeats)
            rates = {
                name: arrays * tokens * d * 2 / seconds[name] for name, (_, arrays) in runs.items()
            }
            best: dict[tuple[str, str], float] = {}
            for name, rate in rates.items():
                share = rate / rates["copy"]
                shown = (
                    f"{1e6 * seconds[name]:.1f} µs, {rate / 1e9:.0f} GB/s, {share:.2f} of the copy"
                )
                report.judge(Figure(f"{where}, {name}", shown, share))
                if name != "copy":
                    kernel, _, direction = name.split()
                    best[kernel, direction] = max(best.get((kernel, direction), 0.0), share)
            if tokens == max(options.tokens):
                for key, share in best.items():
                    name = f"{where}, {' '.join(key)}, the best"
                    report.judge(_judged(name, share, at_least=SHARE_OF_COPY))


def measure_attention(options: argparse.Namespace, report: Report) -> None:
    """Measures attention in each implementation; packed rows have four segments."""
    for sizes in ATTENTION_SIZES:
        runs: dict[str, tuple[Run, int]] = {}
        for name in ATTENTION:
            for packed in (False, True):
                kind = f"{name}, packed" if packed else name
                forwards, both = _attention_runs(name, sizes, packed=packed)
                runs[f"{kind}, forwards"] = forwards, 0
                runs[f"{kind}, with gradients"] = both, 0
        for name, spent in time_in_turn(runs, options.rounds, 5).items():
            report.judge(Figure(f"attention {sizes}, {name}", f"{1e3 * spent:.2f} ms", spent))


def _attention_runs(name: str, sizes: tuple[int, ...], *, packed: bool) -> tuple[Run, Run]:
    rows, tokens, kv_heads, group, head_dim = sizes
    rng = np.random.default_rng(0)
    query, g = (
        jnp.asarray(rng.normal(size=(rows, tokens, kv_heads, group, head_dim)) / 8, jnp.bfloat16)
        for _ in range(2)
    )
    key, value = (
        jnp.asarray(rng.normal(size=(rows, tokens, kv_heads, head_dim)), jnp.bfloat16)
        for _ in range(2)
    )
    quarter = jnp.arange(tokens, dtype=jnp.int32) // (tokens // 4)
    segments = jnp.broadcast_to(1 + quarter if packed else jnp.ones_like(quarter), (rows, tokens))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        layout = AttentionLayout.causal(segments, None, packed=packed)
        return ATTENTION[name](layout, tokens=tokens, keys=tokens)(query, key, value)

    both = _compiled(_gradients(attend), query, g, key, value)
    return _compiled(attend, query, key, value), both


def measure_experts(options: argparse.Namespace, report: Report) -> None:
    """Measures grouped products, after checking their results."""
    for groups, d_in, d_out in options.experts:
        rows = max(options.tokens)
        check_grouped_products(groups, rows, d_in, d_out)
        seconds = time_in_turn(
            {
                name: (_compiled(function, *arrays), 0)
                for name, (function, arrays) in grouped_products(groups, rows, d_in, d_out).items()
            },
            options.rounds,
            options.repeats,
        )
        for name, spent in seconds.items():
            ratio = spent / seconds[DENSE]
            report.judge(
                Figure(
                    f"{rows} rows, {groups} kernels of {d_in} x {d_out}, {name}",
                    f"{1e3 * spent:.3f} ms, {ratio:.1f} of the dense product",
                    ratio,
                )
            )


def measure_steps(options: argparse.Namespace, report: Report) -> None:
    """Measures training steps, and compares them."""
    chip = find_chip(jax.devices()[0].device_kind)
    for group, compared in STEPS:
        sides = run_in_turn(group, rounds=options.rounds, steps=5)
        report.add("", *_TIMES)
        for name, side in sides.items():
            size = small_llama.SIZES["8b" if name.endswith("8B") else "large"]
            rate = size.flops(trained=name.endswith("full")) / statistics.median(side.seconds)
            share = "" if chip is None else f"{rate / chip.flops:.1%}"
            report.add(_row(name, side, size.tokens, share))
        _compare(report, sides, compared)


def measure_generation(options: argparse.Namespace, report: Report) -> None:
    """Measures greedy generation, compared with transformers."""
    sides = run_in_turn(GENERATION, rounds=options.rounds, steps=1)
    new = small_llama.SIZES["large"].batch_size * small_llama.NEW_TOKENS
    report.add("", *_TIMES, *(_row(name, side, new, "") for name, side in sides.items()))
    _compare(report, sides, (("generation", "transformers", GENERATION_OF_TRANSFORMERS),))


def _compare(
    report: Report, sides: dict[str, Side], ratios: tuple[tuple[str, str, float], ...]
) -> None:
    compared = [Comparison(f"{a} / {b}", sides[a], sides[b]) for a, b, _ in ratios]
    report.add("", table(compared), *_HEADING)
    for one, (_, _, bound) in zip(compared, ratios, strict=True):
        report.judge(_judged(one.name, one.ratio, at_most=bound))


_TIMES = (
    "| | s, median (least – most) | tokens a second | utilization | GiB |",
    "| --- | --- | --- | --- | --- |",
)


def _row(name: str, side: Side, tokens: int, share: str) -> str:
    median = statistics.median(side.seconds)
    return (
        f"| {name} | {median:.4f} ({min(side.seconds):.4f} – {max(side.seconds):.4f}) |"
        f" {tokens / median:,.0f} | {share} | {side.peak_bytes / 2**30:.2f} |"
    )


def _judged(
    name: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> Figure:
    if at_least is not None:
        return Figure(name, f"{value:.2f}, target: at least {at_least}", value, value >= at_least)
    assert at_most is not None
    return Figure(name, f"{value:.2f}, target: at most {at_most}", value, value <= at_most)


@exits.command("benchmarks.gpu")
def main() -> int:
    """Runs the selected parts, and returns 1 if a target is missed."""
    parser = Arguments("benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[256, 16384],
        help="numbers of tokens of the kernels' activations",
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[4096, 14336], help="their numbers of features"
    )
    parser.add_argument(
        "--experts",
        type=_three_sizes,
        nargs="+",
        default=[(8, 2048, 4096), (64, 2048, 1024)],
        metavar="GROUPSxINxOUT",
        help="sizes of grouped products, each of the largest number of tokens",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds, in each of which all take one turn"
    )
    parser.add_argument("--repeats", type=int, default=20, help="calls in a turn")
    parser.add_argument("--on_cpu", action="store_true", help="try it out without a GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    if platform != "gpu" and not options.on_cpu:
        parser.error(
            f"JAX found no GPU, but a {platform} ({kind}): install the extra 'gpu' on a machine"
            " with a GPU, or try the benchmark with --on_cpu --tokens 256 --widths 512 --only"
            " kernels"
        )
    report = Report(options.output, f"{kind}, {_versions()}.")
    for part in PARTS:
        if part in options.only:
            MEASURES[part](options, report)
    return int(platform == "gpu" and any(figure.met is False for figure in report.figures))


def _three_sizes(text: str) -> tuple[int, int, int]:
    try:
        groups, d_in, d_out = map(int, text.split("x"))
    except ValueError:
        message = f"{text!r} is not GROUPSxINxOUT, as in 8x2048x4096"
        raise argparse.ArgumentTypeError(message) from None
    return groups, d_in, d_out


MEASURES = {
    "kernels": measure_kernels,
    "attention": measure_attention,
    "experts": measure_experts,
    "steps": measure_steps,
    "generation": measure_generation,
}


def checked_implementations() -> list[str]:
    """Returns the available implementations, after checking their results."""
    implementations = []
    for name in ("xla", "pallas"):
        try:
            check_numbers(name)
            implementations.append(name)
        except KernelError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return implementations


def _versions() -> str:
    names = ("jax", "torch", "peft", "transformers")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
