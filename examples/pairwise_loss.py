"""Trains with a custom loss that makes the better of two answers likelier.

    python -m examples.pairwise_loss

The loss is log(1 + exp(-(s⁺ - s⁻))) of the answers' summed log-probabilities s, relative to the
base model's own difference: Rafailov et al., 2023 (arXiv 2305.18290), eq. 7, with β = 1. Its
batches are dictionaries with leaves [rows, ...].
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from peft_jax.runtime import exits

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def log_probability(model: Any, params: Any, batch: pj.Batch) -> jax.Array:
    """Returns the summed log-probability of each row's targets, [B]."""
    logits = model(params, batch.tokens, segment_ids=batch.segment_ids)
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return jnp.sum(scores[..., 0] * batch.loss_mask, axis=-1)


def pairwise_loss(model: Any, params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of the pairs, summed, and their number."""
    better, worse = (log_probability(model, params, batch[name]) for name in ("better", "worse"))
    losses = jax.nn.softplus(batch["reference"] - (better - worse))
    return jnp.sum(losses), jnp.float32(losses.shape[0])


def make_batches(model: Any, params: Any, count: int) -> Iterator[dict[str, Any]]:
    """Yields random questions whose best answer is token 7."""
    rng = np.random.default_rng(0)
    score = jax.jit(lambda rows: log_probability(model, params, rows))
    for _ in range(count):
        questions = rng.integers(1, 32, (16, 6))
        answers = {"better": np.full((16, 1), 7), "worse": rng.integers(8, 32, (16, 1))}
        mask = np.zeros((16, 7))
        mask[:, -1] = 1
        batch: dict[str, Any] = {
            name: pj.Batch.from_tokens(np.concatenate([questions, answer], axis=1), mask)
            for name, answer in answers.items()
        }
        reference = np.asarray(score(batch["better"]) - score(batch["worse"]))
        yield batch | {"reference": reference}


def train() -> list[float]:
    """Trains, and returns the losses."""
    model = pj.build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    trainer = pj.Trainer(
        model,
        pj.AdapterSpec(pj.LoRA(rank=8)),
        optax.adam(1e-2),
        loss_fn=pairwise_loss,
    )
    losses: list[float] = []
    hooks = pj.Hooks(on_step=lambda step, metrics: losses.append(float(metrics["loss"])))
    trainer.fit(params, make_batches(model, params, 60), hooks=hooks)
    return losses


@exits.command("pairwise_loss")
def main() -> None:
    """Trains, and prints the first and the last losses."""
    losses = train()
    print(f"loss {losses[0]:.3f} -> {np.mean(losses[-5:]):.3f}")


if __name__ == "__main__":
    sys.exit(main())
