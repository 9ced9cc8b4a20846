"""Times the rotation on a CPU, compared with a dense product and with Hugging Face PEFT.

    python -m benchmarks.rotation

Each is timed forward and backward, as in a training step: from the rotation's free entries to the
product with activations, and back to the gradients of both.

    ours    blocks by the Cayley transform, composed, applied block by block
    dense   activations times a given d x d matrix, with the gradient of both
    PEFT    its own BOFT layer makes the d x d matrix, which the activations are multiplied by

All variants and sizes run in turn, so that changes of the machine's speed affect all. The minimum
time of each counts. The growth of the cost is the slope of log time over log size between the
largest sizes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Idle threads of one library must sleep, not spin, while the other library is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.butterfly import compose_butterfly
from kernels_pallas.cayley import cayley
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

BLOCK_SIZE, FACTORS = 8, 2
COMPOSED = BLOCK_SIZE * 2 ** (FACTORS - 1)
WIDTHS, TOKENS_OF_WIDTHS = (256, 512, 1024, 2048), 1024
TOKENS, WIDTH_OF_TOKENS = (256, 512, 1024, 2048, 4096), 1024
WAYS = ("ours", "dense", "PEFT")

Times = dict[tuple[int, int], dict[str, float]]


def ours(d: int, tokens: int) -> Callable[[], None]:
    """Returns a run of our rotation from its entries, with gradients."""
    x, g = _activations(d, tokens)
    entries = 0.1 * np.random.default_rng(1).normal(
        size=(FACTORS, d // BLOCK_SIZE, BLOCK_SIZE * (BLOCK_SIZE - 1) // 2)
    ).astype(np.float32)

    def rotate(x: jax.Array, entries: jax.Array) -> jax.Array:
        return block_rotation(x, compose_butterfly(cayley(entries, BLOCK_SIZE)))

    return _compiled(rotate, x, entries, g)


def dense(d: int, tokens: int) -> Callable[[], None]:
    """Returns a run of a dense product, with gradients."""
    x, g = _activations(d, tokens)
    matrix = np.eye(d, dtype=np.float32)
    return _compiled(jnp.matmul, x, matrix, g)


def peft(d: int, tokens: int) -> Callable[[], None]:
    """Returns a run of PEFT's matrix and the product with it, with gradients."""
    import torch
    from peft import BOFTConfig, get_peft_model

    # Without its CUDA extension PEFT only has one factor; its blocks are as large as our composed.
    model = torch.nn.Sequential()
    model.add_module("linear", torch.nn.Linear(d, 1, bias=False))
    config = BOFTConfig(
        boft_block_size=COMPOSED, boft_n_butterfly_factor=1, target_modules=["linear"]
    )
    layer = get_peft_model(model, config).base_model.model.linear
    free = layer.boft_R["default"]
    with torch.no_grad():
        free.normal_(0, 0.1)
    x, g = (torch.from_numpy(a) for a in _activations(d, tokens))
    x.requires_grad_()

    def run() -> None:
        x.grad = free.grad = None
        matrix, _ = layer.get_delta_weight("default")
        (x @ matrix).backward(g)

    return run


def _activations(d: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, tokens, d)).astype(np.float32)


def _compiled(
    function: Callable[..., jax.Array], x: Any, parameters: Any, g: Any
) -> Callable[[], None]:
    @jax.jit
    def both(x: jax.Array, parameters: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, transpose = jax.vjp(function, x, parameters)
        return y, *transpose(g)

    arrays = [jax.device_put(a) for a in (x, parameters, g)]
    return lambda: jax.block_until_ready(both(*arrays)) and None


MAKERS = {"ours": ours, "dense": dense, "PEFT": peft}


def time_all(sizes: list[tuple[int, int]], *, rounds: int, least_seconds: float) -> Times:
    """Returns the minimum seconds over rounds, by (d, tokens) and variant.

    Args:
      sizes: Pairs of d and tokens.
      rounds: Number of turns of each variant at each size.
      least_seconds: Minimum duration of a turn.
    """
    runs = {(size, way): MAKERS[way](*size) for size in sizes for way in WAYS}
    for run in runs.values():
        run()
    counts = {key: _repeats(run, least_seconds) for key, run in runs.items()}
    least = dict.fromkeys(runs, math.inf)
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
        for key, run in runs.items():
            start = time.perf_counter()
            for _ in range(counts[key]):
                run()
            least[key] = min(least[key], (time.perf_counter() - start) / counts[key])
    return {size: {way: least[size, way] for way in WAYS} for size in sizes}


def _repeats(run: Callable[[], None], least_seconds: float) -> int:
    start = time.perf_counter()
    run()
    return max(1, round(least_seconds / (time.perf_counter() - start)))


def growth(times: Mapping[int, float]) -> float:
    """Returns the exponent of growth: the least-squares slope of log time over log size.

    Args:
      times: Seconds by size; the three largest sizes count.
    """
    sizes = sorted(times)[-3:]
    return float(np.polyfit(np.log(sizes), np.log([times[size] for size in sizes]), 1)[0])


def along(times: Times, way: str, axis: int) -> dict[int, float]:
    """Returns a variant's times by d (axis 0) or by tokens (axis 1), with the other fixed."""
    fixed = (TOKENS_OF_WIDTHS, WIDTH_OF_TOKENS)[axis]
    return {size[axis]: found[way] for size, found in times.items() if size[1 - axis] == fixed}


def report(times: Times) -> str:
    """Returns times, ratios and growth as Markdown."""
    lines = [
        f"Forwards and backwards, float32; ours with blocks of {BLOCK_SIZE} in {FACTORS} factors, "
        f"PEFT's with blocks of {COMPOSED} in one.",
        "",
        "| d | tokens | ours, ms | dense, ms | PEFT, ms | dense / ours | PEFT / ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (d, tokens), found in sorted(times.items()):
        milliseconds = [f"{1e3 * found[way]:.2f}" for way in WAYS]
        ratios = [f"{found[way] / found['ours']:.1f}" for way in ("dense", "PEFT")]
        lines.append(f"| {d} | {tokens} | {' | '.join(milliseconds + ratios)} |")
    lines += ["", "| the cost grows with | ours | dense | PEFT |", "| --- | --- | --- | --- |"]
    for axis, name in enumerate(("d", "tokens")):
        powers = [f"{name}^{growth(along(times, way, axis)):.2f}" for way in WAYS]
        lines.append(f"| {name} | {' | '.join(powers)} |")
    return "\n".join(lines) + "\n"


def draw(times: Times, path: Path) -> None:
    """Plots the times over d and over tokens, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (panel, name) in enumerate(zip(panels, ("d", "tokens"), strict=True)):
        for way in WAYS:
            found = dict(sorted(along(times, way, axis).items()))
            panel.plot(
                list(found),
                [1e3 * seconds for seconds in found.values()],
                marker="o",
                label=f"{way}: {name}^{growth(found):.2f}",
            )
        fixed = (f"{TOKENS_OF_WIDTHS} tokens", f"d {WIDTH_OF_TOKENS}")[axis]
        panel.set(xscale="log", yscale="log", xlabel=f"{name} ({fixed})")
        panel.minorticks_off()
        panel.set_xticks(list(found), labels=list(map(str, found)))
        panel.legend()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, forwards and backwards")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@exits.command("benchmarks.rotation")
def main() -> None:
    """Times all variants and writes table, plot and numbers."""
    parser = Arguments("benchmarks.rotation", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds, in each of which all take one turn"
    )
    parser.add_argument(
        "--least_seconds", type=float, default=0.03, help="least seconds of one turn"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    sizes = {(d, TOKENS_OF_WIDTHS) for d in WIDTHS} | {(WIDTH_OF_TOKENS, t) for t in TOKENS}
    times = time_all(sorted(sizes), rounds=options.rounds, least_seconds=options.least_seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [{"d": d, "tokens": tokens, **found} for (d, tokens), found in times.items()]
    (options.output / "rotation.json").write_text(json.dumps(rows))
    (options.output / "rotation.md").write_text(report(times))
    draw(times, options.output / "rotation.png")
    print(report(times))


if __name__ == "__main__":
    sys.exit(main())
