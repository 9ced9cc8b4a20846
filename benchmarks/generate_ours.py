"""Generates greedily with peft_jax, as a worker: `python -m benchmarks.generate_ours generate`."""

import sys

import jax
import numpy as np

from benchmarks import small_llama as setup
from benchmarks.step_ours import device_peak
from benchmarks.worker import await_turn, serve
from peft_jax.generation import GenerationSettings, generate
from peft_jax.models import ExecutionSettings, build_model


def main(options: setup.Options) -> None:
    """Builds a model and prompts, and serves their continuation."""
    model = build_model(options.size.config, ExecutionSettings(compute_dtype=options.dtype))
    params = model.init_params(jax.random.key(0), options.dtype, options.quantization)
    prompts = list(setup.prompts(options.size))
    settings = GenerationSettings(
        max_new_tokens=setup.NEW_TOKENS, eos_ids=(), batch_size=len(prompts)
    )

    await_turn()

    def run() -> float:
        found = generate(model, params, prompts, settings)
        return float(np.concatenate([each.tokens for each in found.completions]).mean())

    serve(run, warm_up=1, device_peak=device_peak, library="peft_jax", method="generate")


if __name__ == "__main__":
    main(setup.parse(sys.argv[1:]))
