"""Trains with a custom loop over `Trainer.initialize` and `Trainer.step`.

    python -m examples.own_loop

The loop stops when the held-out loss has not fallen for three evaluations, and keeps the best
adapter.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from examples.pairwise_loss import CONFIG
from peft_jax.runtime import exits


def make_batch(seed: int) -> pj.Batch:
    """Returns rows that count upwards from random tokens."""
    starts = np.random.default_rng(seed).integers(0, 32, (16, 1))
    return pj.Batch.from_tokens((starts + np.arange(12)) % 32)


def train() -> tuple[list[float], Any]:
    """Trains, and returns the held-out losses and the merged parameters of the best adapter."""
    model = pj.build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    trainer = pj.Trainer(model, pj.AdapterSpec(pj.LoRA(rank=16)), optax.adam(1e-2))
    training = trainer.initialize(params)
    held_out = [make_batch(-1 % 2**32)]
    losses: list[float] = []
    best = training.adapter
    for step in range(1, 401):
        trainer.step(training, make_batch(step))
        if step % 20:
            continue
        losses.append(trainer.evaluate(training, held_out))
        if losses[-1] == min(losses):
            # Copied, because the next step donates the buffers.
            best = jax.tree.map(jnp.copy, training.adapter)
        elif min(losses[-3:]) > min(losses):
            break
    return losses, trainer.spec.merge(params, best)


@exits.command("own_loop")
def main() -> None:
    """Trains, and prints the first and the best held-out loss."""
    losses, _ = train()
    print(f"held-out loss {losses[0]:.3f} -> {min(losses):.3f} in {20 * len(losses)} steps")


if __name__ == "__main__":
    sys.exit(main())
