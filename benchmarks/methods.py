"""Compares the training step of every method with LoRA's: its time, and its memory.

    python -m benchmarks.methods --rounds=7

Steps of LoRA and of a method alternate in one process, on one random Llama and one batch. A round
gives one ratio: the method's seconds over the mean of LoRA's before and after. The table shows the
median and the range over rounds, and the bytes that the compiler counts for a step.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

_RANKED = (
    *("lora", "dora", "lora_fa", "adalora", "lora_ga", "lora_one", "eva", "pissa", "olora"),
    *("loha", "lokr", "gralora", "hira", "miss", "shira", "hra"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 8} for name in _RANKED},
    "boft": {"block_size": 8, "n_butterfly_factors": 2},
    "oft": {"block_size": 8},
    "hybrid": {"rank": 8, "block_size": 8, "n_butterfly_factors": 2},
    "trainable_tokens": {"token_indices": tuple(range(8))},
}
"""Settings of methods, where they are not the defaults."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled training step.

    Attributes:
      run: Takes one step, and waits for it.
      trainable: Number of trainable parameters.
      mebibytes: What the compiler counts for a step, arguments included.
    """

    run: Callable[[], None]
    trainable: int
    mebibytes: float


@exits.command("benchmarks.methods")
def main() -> None:
    """Times all methods and prints the table."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = Arguments("benchmarks.methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[], help="methods to time, instead of all")
    parser.add_argument("--rounds", type=int, default=7, help="ratios for each method")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of the Llama, whose width is 512"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="seconds on the wall, or of all cores, which other programs change less",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    bench = Bench(options)
    lora = bench.make("lora")
    found = {"lora": {"trainable": lora.trainable, "mebibytes": lora.mebibytes, "ratios": [1.0]}}
    for name in options.methods or [name for name in bench.names if name != "lora"]:
        step = bench.make(name)
        ratios = compare(step, lora, rounds=options.rounds, clock=CLOCKS[options.clock])
        found[name] = {
            "trainable": step.trainable,
            "mebibytes": step.mebibytes,
            "ratios": ratios,
        }
        print(line(name, found), flush=True)
        del step
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(options).items()}
    content = json.dumps({"settings": settings, "methods": found}, indent=1)
    (options.output / "methods.json").write_text(content + "\n")
    print(table(found))


class Bench:
    """A random Llama and a batch.

    Args:
      options: Flags.
    """

    def __init__(self, options: argparse.Namespace):
        import jax

        from benchmarks import small_llama
        from benchmarks.step_ours import make_batch
        from peft_jax.adapters import METHODS
        from peft_jax.models import ExecutionSettings, build_model
        from peft_jax.runtime.cpu_allocator import dispatch_inline, keep_freed_memory

        dispatch_inline()
        keep_freed_memory()
        # LoftQ needs a quantized base, and has LoRA's step.
        self.names = [name for name, m in METHODS.items() if not m.corrects_quantization]
        config = small_llama.SIZES["small"].config | {"num_hidden_layers": options.layers}
        size = small_llama.Size(config, options.rows, options.length)
        self._model = build_model(config, ExecutionSettings(compute_dtype="float32"))
        self._params = self._model.init_params(jax.random.key(0))
        self._batch = jax.device_put(make_batch(size))

    def make(self, name: str) -> Step:
        """Compiles the step of a method, and takes a first one."""
        import jax

        from peft_jax.adapters import AdapterSpec, count_parameters, make_method
        from peft_jax.optim import MixingSettings, OptimizerSettings, make_optimizer
        from peft_jax.training.program import step_bytes
        from peft_jax.training.state import TrainState
        from peft_jax.training.step import TrainStep, summed_loss

        model, params = self._model, self._params
        spec = AdapterSpec(make_method(name, **SETTINGS.get(name, {})))
        adapter = spec.init(
            jax.random.key(1),
            params,
            loss_fn=lambda bound, rows: summed_loss(model, bound, rows, chunk_size=CHUNK)[0],
            batches=[self._batch],
        )
        branches = spec.method.branches
        mixing = MixingSettings() if branches else None
        settings = OptimizerSettings(learning_rate=1e-4)
        optimizer = make_optimizer(settings, 1000, mixing=mixing, branches=branches)
        step = TrainStep(
            model=model,
            spec=spec,
            optimizer=optimizer,
            learning_rate=None,
            chunk_size=CHUNK,
            seed=0,
            packed=False,
        )
        state = TrainState.create(jax.tree.map(lambda a: a.copy(), adapter.trainable), optimizer)
        frozen, constant = spec.frozen(params), adapter.constant
        rows = jax.tree.map(lambda a: a[None], self._batch)
        trainable = count_parameters(spec, params, adapter).trainable
        compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, constant, rows).compile()

        def run() -> None:
            nonlocal state
            state, metrics = compiled(state, frozen, constant, rows)
            jax.block_until_ready(metrics)

        run()
        return Step(run=run, trainable=trainable, mebibytes=(step_bytes(compiled) or 0) / 2**20)


def compare(step: Step, lora: Step, *, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Returns ratios of a step's seconds to LoRA's, which is timed before and after."""

    def seconds(one: Step) -> float:
        start = clock()
        one.run()
        return clock() - start

    ratios, before = [], seconds(lora)
    for _ in range(rounds):
        own, after = seconds(step), seconds(lora)
        ratios.append(2 * own / (before + after))
        before = after
    return ratios


def line(name: str, found: dict[str, Any]) -> str:
    """Returns a method's row of the table."""
    own, ratios = found[name], found[name]["ratios"]
    memory = own["mebibytes"] / found["lora"]["mebibytes"]
    return (
        f"| `{name}` | {own['trainable']:,} | {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}) | {memory:.2f} |"
    )


def table(found: dict[str, Any]) -> str:
    """Returns the table of all methods."""
    head = [
        "| method | trainable | step time / LoRA's, median and range | memory / LoRA's |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(head + [line(name, found) for name in found])


if __name__ == "__main__":
    main()
