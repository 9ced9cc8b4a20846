"""Measures rounding error, memory and trained loss of quantized base models.

    python -m benchmarks.quantization --model=/path/to/tinystories656K --data=/path/to/gsm8k

It trains the same adapters on the same batches over the base model in bfloat16, int8 and NF4, and
prints tables. Losses are held-out losses.
"""

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

FORMATS = ("none", "int8", "nf4")
METHODS = ("lora", "lora_ga", "boft", "unitary", "hybrid")

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
    parser.add_argument("--steps", type=int, default=100, help="training steps of each")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    errors = rounding_errors(options.model)
    losses = {
        method: [
            train(options.model, options.data, method, quantization, options.steps)
            for quantization in FORMATS
        ]
        for method in options.methods
    }
    text = f"{_error_table(errors)}\n\n{_loss_table(losses)}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quantization.md").write_text(text)
    (options.output / "quantization.json").write_text(json.dumps(losses, indent=2))
    print(text)


def rounding_errors(model: str) -> list[dict[str, Any]]:
    """Returns, for each format, errors of kernels and logits relative to bfloat16, and bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from peft_jax.core import bytes_of, dense, flatten, is_quantized_leaf
    from peft_jax.hub import load_model

    tokens = jax.random.randint(jax.random.key(0), (4, 128), 3, 2000)
    found: list[dict[str, Any]] = []
    kernels, logits = None, None
    for quantization in FORMATS:
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


def train(model: str, data: str, method: str, quantization: str, steps: int) -> dict[str, float]:
    """Trains an adapter, and returns the held-out loss before and after."""
    from peft_jax.runtime.progress import Reporter
    from peft_jax.training import config_files, from_config_dict, run

    config = config_files.base(method=method, precision="float32")
    config.model.path = model
    config.model.dtype = "bfloat16"
    config.model.quantization = quantization
    config.data.recipe = "gsm8k"
    config.data.path = data
    config.data.eval_rows = 128
    config.train.steps = steps
    config.train.batch_size = 8
    config.train.max_length = 512
    config.train.learning_rate = LEARNING_RATES[method]
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    config.logging.tensorboard = False
    config.checkpoint.every = 0
    with tempfile.TemporaryDirectory() as folder:
        summary = run(from_config_dict(config), Path(folder, "run"), reporter=Reporter(quiet=True))
    print(method, quantization, summary["loss_after"], file=sys.stderr, flush=True)
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


def _loss_table(losses: dict[str, list[dict[str, float]]]) -> str:
    names = [_name(quantization) for quantization in FORMATS]
    lines = [
        f"| method | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        "| before | " + " | ".join(f"{one['before']:.4f}" for one in next(iter(losses.values()))),
    ]
    lines[-1] += " |"
    for method, runs in losses.items():
        cells = [f"{runs[0]['after']:.4f}"]
        cells += [
            f"{one['after']:.4f} ({100 * (one['after'] / runs[0]['after'] - 1):+.2f}%)"
            for one in runs[1:]
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(quantization: str) -> str:
    return "bfloat16" if quantization == "none" else quantization


if __name__ == "__main__":
    sys.exit(main())
