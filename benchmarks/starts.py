"""Compares starts of LoRA-GA: their costs, and the losses that training ends at.

    python -m benchmarks.starts --model=FOLDER --data=FOLDER --recipe=gsm8k

Each start estimates the gradient's directions in its own way: in one backward pass over the
microbatches, in six, in one over other microbatches, or at random. From each, the same batches are
trained on, and the held-out loss is measured. It prints paired differences over seeds with 95%
t-intervals. "other" is the yardstick: what other first rows change.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

STARTS = ("one", "six", "other", "random")
"""One pass; six passes; one pass over the microbatches after those; random directions."""
HELD_OUT = 64


@exits.command("benchmarks.starts")
def main() -> None:
    """Measures costs, trains from each start and prints tables."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = Arguments("benchmarks.starts", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--data", required=True, help="the rows of --recipe")
    parser.add_argument(
        "--recipe", choices=("gsm8k", "flores"), default="gsm8k", help="data set to train on"
    )
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=list(STARTS), help="starts to compare"
    )
    parser.add_argument("--seeds", type=int, default=3, help="0: measure costs only")
    parser.add_argument("--steps", type=int, default=30, help="training steps from each start")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per step")
    parser.add_argument("--max_length", type=int, default=128, help="tokens per row")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--skip_costs", action="store_true", help="compare losses only")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    bench = load(options)
    found: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}}
    if not options.skip_costs:
        found["costs"] = costs(bench, options)
        print(costs_table(found["costs"]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"starts-{Path(options.model).name}-{options.recipe}.json"
    found["losses"] = []
    for seed in range(1, options.seeds + 1):
        found["losses"].append(train_seed(bench, options, seed))
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(losses_table(found["losses"]), flush=True)


def load(options: argparse.Namespace) -> Any:
    """Loads the model and the rows."""
    from eval.study.bench import Bench
    from eval.study.settings import TaskSettings
    from peft_jax.training import config_files

    config = config_files.base(method="lora_ga", precision="float32")
    config.model.path = options.model
    config.data.recipe = options.recipe
    config.data.path = options.data
    if options.recipe == "flores":
        config.data.train_split = "dev"
        config.data.source_language, config.data.target_language = "eng_Latn", "swh_Latn"
    config.data.check_rows = config.data.prefetch = 0
    config.data.too_long = "truncate"
    config.data.hold_out = HELD_OUT
    config.train.steps = options.steps
    config.train.batch_size = options.batch_size
    config.train.max_length = options.max_length
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    test = {"eval_split": {"gsm8k": "test", "flores": "devtest"}[options.recipe], "eval_rows": 8}
    task = TaskSettings(
        name=options.recipe,
        title=options.recipe,
        config=config,
        test=test,
        grids={"only": (options.rate,)},
    )
    return Bench(task, arm_of(1))


def arm_of(passes: int) -> Any:
    """Returns LoRA-GA with a number of passes."""
    from eval.study.settings import ArmSettings

    return ArmSettings(
        name=f"passes {passes}",
        title="LoRA-GA",
        method={"name": "lora_ga", "init_passes": passes},
        grid="only",
    )


def program_of(bench: Any, options: argparse.Namespace, start: str, seed: int) -> tuple[Any, Any]:
    """Returns the configuration of a run from a start, and its program."""
    from eval.study.trials import Trial

    arm = arm_of(6 if start == "six" else 1)
    config = bench.task.run_config(arm, Trial(options.rate), seed=seed)
    # The step does not depend on the start, so that one is compiled for all.
    return config, bench.program(arm_of(1), config)


def estimate(bench: Any, options: argparse.Namespace, start: str, seed: int) -> Any:
    """Returns the gradient factors of a start."""
    import dataclasses

    import jax

    from peft_jax.parallel import on_mesh

    config, program = program_of(bench, options, start, seed)
    blueprint = dataclasses.replace(
        program.blueprint, config=config, init_passes=config.init_passes
    )
    first = blueprint.init_batches if start == "other" else 0
    batches = bench.batches(seed)[first : first + blueprint.init_batches]
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if start == "random":
        return random_factors(blueprint, key)
    with on_mesh(blueprint.mesh):
        return blueprint.start_factors(
            key, bench.params(seed), blueprint.init_microbatches(batches)
        )


def random_factors(blueprint: Any, key: Any) -> dict[Any, Any]:
    """Returns orthonormal directions that know nothing of the gradient."""
    import jax
    import jax.numpy as jnp

    from peft_jax.adapters import GradientFactors
    from peft_jax.core import flatten

    factors = {}
    flat = flatten(blueprint.params)
    for index, (path, rank) in enumerate(blueprint.spec.start_ranks(blueprint.params).items()):
        *stack, d_in, d_out = flat[path].shape
        left, right = jax.random.split(jax.random.fold_in(key, index))
        factors[path] = GradientFactors(
            u=jnp.linalg.qr(jax.random.normal(left, (*stack, d_in, rank)))[0],
            s=jnp.ones((*stack, rank)),
            v=jnp.linalg.qr(jax.random.normal(right, (*stack, d_out, rank)))[0],
        )
    return factors


def train_seed(bench: Any, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Trains from each start on the same batches, and returns the held-out losses."""
    import jax

    from eval.study.trial_optimizer import set_rates
    from peft_jax.adapters import AdapterState
    from peft_jax.parallel import on_mesh
    from peft_jax.training import TrainState

    losses = {}
    for start in options.starts:
        config, program = program_of(bench, options, start, seed)
        blueprint, params = program.blueprint, bench.params(seed)
        factors = estimate(bench, options, start, seed)
        with on_mesh(blueprint.mesh):
            key = jax.random.fold_in(jax.random.key(seed), 0)
            adapter = blueprint.initialize(key, params, factors=factors)
        state = program.make_state(adapter.trainable)
        rates = set_rates(state.opt_state, config.applied_optimizer, bench.steps(config))
        state = TrainState(step=state.step, trainable=state.trainable, opt_state=rates)
        frozen = blueprint.spec.frozen(params)
        for batch in bench.batches(seed):
            placed = blueprint.placement.put_microbatches(batch, 1)
            state, _ = program.step(state, frozen, adapter.constant, placed)
        trained = AdapterState(trainable=state.trainable, constant=adapter.constant)
        losses[start] = bench.measure(arm_of(1), config, trained, "tuning").loss
        print(f"seed {seed}, {start}: {losses[start]:.4f}", flush=True)
    return {"seed": seed, **losses}


def costs(bench: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measures seconds of warm starts and steps, of compiling them, and memory."""
    import jax

    from peft_jax.training.program import step_bytes

    _, program = program_of(bench, options, "one", 1)
    blueprint = program.blueprint
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=blueprint.placement.rows),
        blueprint.batch,
    )
    found: dict[str, Any] = {"microbatches": blueprint.config.init_batches}
    for name, trace in (
        ("step", blueprint.trace_step),
        ("pass", lambda: blueprint.trace_start(rows)),
    ):
        compiled, spent = timed(_compile, trace)
        found[name] = {"compile": spent, "bytes": step_bytes(compiled)}
    found["step"] |= {"warm": time_steps(bench, program)}
    for start in ("one", "six"):
        if start in options.starts:
            _, first = timed(estimate, bench, options, start, 1)
            found[start] = {"first": first, "warm": timed(estimate, bench, options, start, 1)[1]}
    return found


def time_steps(bench: Any, program: Any) -> tuple[float, float]:
    """Returns the least seconds of a warm step."""
    import jax

    blueprint, params = program.blueprint, bench.params(1)
    factors = random_factors(blueprint, jax.random.key(0))
    adapter = blueprint.initialize(jax.random.key(0), params, factors=factors)
    state = program.make_state(adapter.trainable)
    frozen = blueprint.spec.frozen(params)
    times = []
    for batch in bench.batches(1)[:4]:
        placed = blueprint.placement.put_microbatches(batch, 1)
        (state, _), spent = timed(program.step, state, frozen, adapter.constant, placed)
        times.append(spent)
    return min(times[1:])


def _compile(trace: Callable[[], Any]) -> Any:
    return trace().lower().compile()


def timed(work: Callable[..., Any], *args: Any) -> tuple[Any, tuple[float, float]]:
    """Returns the result of a call, and its CPU seconds and seconds.

    CPU seconds are of all threads. They hardly depend on what else the machine does.
    """
    import jax

    began, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(work(*args))
    return result, (time.process_time() - cpu, time.perf_counter() - began)


def costs_table(found: dict[str, Any]) -> str:
    """Returns the costs as a Markdown table."""
    step, one = found["step"], found["pass"]
    over = f"over {found['microbatches']} microbatches"
    rows = [
        ("training step", step["warm"], f"{step['compile'][0]:.1f} | {step['bytes'] / 2**20:.0f}")
    ]
    if "one" in found:
        rest = f"{one['compile'][0]:.1f} | {one['bytes'] / 2**20:.0f}"
        rows.append((f"start, one pass {over}", found["one"]["warm"], rest))
    if "six" in found:
        rows.append((f"start, six passes {over}", found["six"]["warm"], "| "))
    lines = [
        "| | CPU s, warm | steps | s | compilation, CPU s | memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (cpu, seconds), rest in rows:
        share = cpu / step["warm"][0]
        lines.append(f"| {name} | {cpu:.2f} | {share:.1f} | {seconds:.2f} | {rest} |")
    for start in sorted({"one", "six"} & set(found)):
        lines.append(f"\nfirst call of {start}: {found[start]['first'][0]:.1f} CPU s")
    return "\n".join(lines)


def losses_table(losses: Sequence[dict[str, Any]]) -> str:
    """Returns the losses by seed, and paired differences from one pass, as Markdown tables."""
    starts = [start for start in STARTS if start in losses[0]]
    lines = [f"| seed | {' | '.join(starts)} |", f"|{' --- |' * (len(starts) + 1)}"]
    for one in losses:
        lines.append(f"| {one['seed']} | {' | '.join(f'{one[s]:.4f}' for s in starts)} |")
    for start in starts:
        if start != "one" and "one" in starts and len(losses) > 1:
            mean, half = interval([one[start] - one["one"] for one in losses])
            lines.append(f"\n{start} - one: {mean:+.4f} ± {half:.4f} (n = {len(losses)})")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95% t-interval.

    Example:
      >>> tuple(round(x, 3) for x in interval([1.0, 2.0, 3.0]))
      (2.0, 2.484)
    """
    from scipy import stats

    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)


if __name__ == "__main__":
    sys.exit(main())
