"""Measures rounding error, memory and trained loss of quantized base models.

    python -m benchmarks.quantization --model=/path/to/tinystories656K --data=/path/to/gsm8k

It trains the same adapters on the same batches over the base model in bfloat16, int8, NF4, w8a8 and
w8a8g8, and prints tables. Losses are held-out losses. Differences are paired by seed, with 95%
t-intervals.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

FORMATS = ("none", "int8", "nf4", "w8a8", "w8a8g8")
METHODS = ("lora", "lora_ga", "boft", "unitary", "hybrid")

Losses = dict[str, dict[str, list[dict[str, float]]]]
"""Losses before and after training, by method, format and seed."""

LEARNING_RATES = {"lora": 1e-2, "lora_ga": 5e-3, "boft": 2e-2, "unitary": 2e-2, "hybrid": 1e-2}
"""Learning rates for a model of less than a million parameters and a hundred steps."""


@exits.command("benchmarks.quantization")
def main() -> None:
    """Runs everything and prints tables."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = Arguments("benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--data", required=True, help="GSM8K: a folder with train and test rows")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="adapters to train"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS[1:], default=list(FORMATS[1:]), help="formats"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method and format")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per row")
    parser.add_argument("--eval_rows", type=int, default=128, help="held-out rows")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        help="learning rates, as lora=2e-3; others are for a"
        " model of less than a million parameters",
    )
    parser.add_argument(
        "--attention",
        type=float,
        default=1.0,
        help="factor on the learning rate of the attention (self_attn)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    rates = LEARNING_RATES | dict(_rate(text) for text in options.rates)
    formats = ["none", *options.formats]
    options.output.mkdir(parents=True, exist_ok=True)
    errors = rounding_errors(options.model, formats)
    losses: Losses = {}
    for seed in range(options.seeds):
        for method in options.methods:
            for quantization in formats:
                found = train(options, method, quantization, rate=rates[method], seed=seed)
                losses.setdefault(method, {}).setdefault(quantization, []).append(found)
        text = f"{_error_table(errors)}\n\n{_loss_table(losses)}\n"
        (options.output / "quantization.md").write_text(text)
        (options.output / "quantization.json").write_text(json.dumps(losses, indent=2))
    print(text)


def _rate(text: str) -> tuple[str, float]:
    method, equals, value = text.partition("=")
    if method not in METHODS or not equals:
        raise ValueError(f"--rates has {text!r}, but must have METHOD=RATE, such as lora=2e-3")
    return method, float(value)


def rounding_errors(model: str, formats: Iterable[str]) -> list[dict[str, Any]]:
    """Returns, for each format, errors of kernels and logits relative to bfloat16, and bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from peft_jax.core import bytes_of, dense, flatten, is_quantized_leaf
    from peft_jax.hub import load_model

    tokens = jax.random.randint(jax.random.key(0), (4, 128), 3, 2000)
    found: list[dict[str, Any]] = []
    kernels, logits = None, None
    for quantization in formats:
        lm, params = load_model(model, dtype="bfloat16", quantization=quantization)
        flat = flatten(params)
        own_kernels = jnp.concatenate(
            [
                dense(leaf).astype(jnp.float32).ravel()
                for path, leaf in flat.items()
                if is_quantized_leaf(path)
            ]
        )
        own_logits = jax.jit(lm)(params, tokens)
        kernels = own_kernels if kernels is None else kernels
        logits = own_logits if logits is None else logits
        abstract = flatten(lm.abstract_params("bfloat16", quantization))
        found.append(
            {
                "format": quantization,
                "kernels": _relative(np.asarray(own_kernels), np.asarray(kernels)),
                "logits": _relative(np.asarray(own_logits), np.asarray(logits)),
                "bytes": bytes_of({p: v for p, v in abstract.items() if is_quantized_leaf(p)}),
            }
        )
    return found


def train(
    options: argparse.Namespace, method: str, quantization: str, *, rate: float, seed: int
) -> dict[str, float]:
    """Trains an adapter, and returns the held-out loss before and after."""
    from peft_jax.runtime.progress import Reporter
    from peft_jax.training import config_files, from_config_dict, run

    config = config_files.base(method=method, precision="float32")
    config.seed = seed
    config.model.path = options.model
    config.model.dtype = "bfloat16"
    config.model.quantization = quantization
    config.data.recipe = "gsm8k"
    config.data.path = options.data
    config.data.eval_rows = options.eval_rows
    config.train.steps = options.steps
    config.train.batch_size = options.batch_size
    config.train.max_length = options.max_length
    config.train.learning_rate = rate
    if options.attention != 1.0:
        config.optimizer.rate_factors = {"self_attn": options.attention}
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    config.logging.tensorboard = False
    config.checkpoint.every = 0
    with tempfile.TemporaryDirectory() as folder:
        summary = run(from_config_dict(config), Path(folder, "run"), reporter=Reporter(quiet=True))
    print(seed, method, quantization, summary["loss_after"], file=sys.stderr, flush=True)
    return {"before": summary["loss_before"], "after": summary["loss_after"]}


def _relative(found: Any, expected: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _error_table(errors: Iterable[dict[str, Any]]) -> str:
    rows = list(errors)
    lines = [
        "| base | kernels, bytes | share | error of kernels | error of logits |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {_name(row['format'])} | {row['bytes']:,} | {row['bytes'] / rows[0]['bytes']:.3f} |"
        f" {row['kernels']:.4f} | {row['logits']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _loss_table(losses: Losses) -> str:
    """Returns mean losses, and differences in percent with 95% intervals over paired seeds."""
    import numpy as np

    first = next(iter(losses.values()))
    lines = [
        f"| method | {' | '.join(_name(quantization) for quantization in first)} |",
        f"| --- |{' --- |' * len(first)}",
    ]
    before = [f"{runs[0]['before']:.4f}" for runs in first.values()]
    lines.append(f"| before | {' | '.join(before)} |")
    for method, by_format in losses.items():
        dense = np.array([run["after"] for run in by_format["none"]])
        cells = [f"{dense.mean():.4f}"]
        for runs in list(by_format.values())[1:]:
            after = np.array([run["after"] for run in runs])
            cells.append(f"{after.mean():.4f} ({_interval(100 * (after - dense) / dense.mean())})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(values: Any) -> str:
    """Returns the mean in percent, with its 95% t-interval if there are several values."""
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return f"{values[0]:+.2f}%"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.2f} ± {half:.2f}%"


def _name(quantization: str) -> str:
    return "bfloat16" if quantization == "none" else quantization


if __name__ == "__main__":
    sys.exit(main())
