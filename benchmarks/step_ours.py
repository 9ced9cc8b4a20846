"""Serves a training step of peft_jax, as a worker: `python -m benchmarks.step_ours METHOD`."""

import sys

import jax
import numpy as np

from benchmarks import small_llama as setup
from benchmarks.worker import await_turn, serve
from peft_jax.adapters import AdapterSpec, count_parameters, make_method
from peft_jax.data import Batch
from peft_jax.models import ExecutionSettings, build_model
from peft_jax.optim import (
    MixingSettings,
    OptimizerSettings,
    learning_rate_schedule,
    make_optimizer,
)
from peft_jax.runtime.cpu_allocator import dispatch_inline, keep_freed_memory
from peft_jax.training.state import TrainState
from peft_jax.training.step import TrainStep, summed_loss

SETTINGS = {
    "full": {},
    "lora": {"rank": setup.RANK},
    "lora_ga": {"rank": setup.RANK},
    "dora": {"rank": setup.RANK},
    "oft": {"block_size": setup.OFT_BLOCK_SIZE},
    "boft": {"block_size": setup.BLOCK_SIZE, "n_butterfly_factors": setup.N_BUTTERFLY_FACTORS},
    "boft_one": {"block_size": setup.BLOCK_SIZE, "n_butterfly_factors": 1},
    "unitary": {},
    "hybrid": {
        "rank": setup.RANK,
        "block_size": setup.BLOCK_SIZE,
        "n_butterfly_factors": setup.N_BUTTERFLY_FACTORS,
    },
}
NAMES = {"boft_one": "boft"}
"""Method names of entries with another name."""
CHUNK = 2048


def make_batch(size: setup.Size) -> Batch:
    """Returns random rows in which every token but the last has a target."""
    shape = (size.batch_size, size.length)
    tokens = np.random.default_rng(0).integers(0, size.config["vocab_size"], shape, np.int32)
    mask = np.ones(shape, np.float32)
    mask[:, -1] = 0
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_mask=mask,
        positions=np.broadcast_to(np.arange(size.length, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
    )


def device_peak() -> int | None:
    """Returns the peak memory of the first device in bytes; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def main(options: setup.Options) -> None:
    """Builds the step of one method and serves it."""
    method = options.method
    dispatch_inline()
    execution = ExecutionSettings(
        compute_dtype=options.dtype, scan_layers=options.scan_layers, kernels=options.kernels
    )
    model = build_model(options.size.config, execution)
    params = model.init_params(jax.random.key(0), options.dtype, options.quantization)
    spec = AdapterSpec(method=make_method(NAMES.get(method, method), **SETTINGS[method]))
    batch = jax.device_put(make_batch(options.size))
    await_turn()
    adapter = spec.init(
        jax.random.key(1),
        params,
        loss_fn=lambda bound, rows: summed_loss(model, bound, rows, chunk_size=CHUNK)[0],
        batches=[batch],
    )
    settings = OptimizerSettings(learning_rate=setup.LEARNING_RATE)
    branches = spec.method.branches
    mixing = MixingSettings() if branches else None
    optimizer = make_optimizer(settings, 1000, mixing=mixing, branches=branches)
    train_step = TrainStep(
        model=model,
        spec=spec,
        optimizer=optimizer,
        learning_rate=learning_rate_schedule(settings, 1000),
        chunk_size=CHUNK,
        seed=0,
        packed=False,
    )
    count = count_parameters(spec, params, adapter)
    step = jax.jit(train_step, donate_argnums=0)
    state = TrainState.create(jax.tree.map(lambda a: a.copy(), adapter.trainable), optimizer)
    frozen, constant = spec.frozen(params), adapter.constant
    del params, adapter
    rows = jax.tree.map(lambda a: a[None], batch)

    state, _ = step(state, frozen, constant, rows)  # compiles
    keep_freed_memory()

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, constant, rows)
        return float(metrics["loss"])

    serve(
        run,
        device_peak=device_peak,
        trainable=count.trainable,
        library="peft_jax",
        method=method,
    )
    if train_step.traces != 1:
        raise RuntimeError(f"the step was traced {train_step.traces} times")


if __name__ == "__main__":
    main(setup.parse(sys.argv[1:]))
