"""Compares a checkpoint's logits and greedy continuations with transformers, in float32.

    python -m benchmarks.agreement --model=/path/to/checkpoint

It needs torch. The two models are loaded one after the other, so that it takes the memory of one.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
    "Mji mkuu wa Tanzania ni Dodoma, lakini mji mkubwa zaidi ni",
)

Logits = Float32[np.ndarray, "tokens vocab"]
Tokens = Int[np.ndarray, " tokens"]


@exits.command("benchmarks.agreement")
def main() -> None:
    """Runs both models and prints the differences."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = Arguments("benchmarks.agreement", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="texts to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each continuation")
    options = parser.parse_args()
    rows, expected, theirs = run_transformers(options.model, options.texts, options.tokens)
    logits, ours = run_ours(options.model, rows, options.tokens)
    for line in summary(rows, expected, logits, theirs, ours):
        print(line)


def run_transformers(
    model: str, texts: Sequence[str], tokens: int
) -> tuple[list[Tokens], list[Logits], list[Tokens]]:
    """Returns the texts' tokens, their logits and their continuations by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # Without end tokens and the checkpoint's own settings.
    reference.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    rows, logits, continued = [], [], []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")
            found = reference.generate(**ids)
            length = ids["input_ids"].shape[1]
            rows.append(found[0, :length].numpy())
            continued.append(found[0, length:].numpy())
            logits.append(reference(found).logits[0].numpy())
    return rows, logits, continued


def run_ours(model: str, rows: Sequence[Tokens], tokens: int) -> tuple[Any, list[Tokens]]:
    """Returns a function of tokens to logits, and the continuations by this library."""
    import jax
    import jax.numpy as jnp

    from peft_jax.generation import GenerationSettings, generate
    from peft_jax.hub import load_model

    lm, params = load_model(model)
    forward = jax.jit(lm)
    settings = GenerationSettings(max_new_tokens=tokens, eos_ids=(), batch_size=len(rows))
    found = generate(lm, params, list(rows), settings)
    return (
        lambda row: np.asarray(forward(params, jnp.asarray(row[None])))[0],
        [each.tokens for each in found.completions],
    )


def summary(
    rows: Sequence[Tokens],
    expected: Sequence[Logits],
    logits: Any,
    theirs: Sequence[Tokens],
    ours: Sequence[Tokens],
) -> list[str]:
    """Returns lines on the largest difference of logits, and on the continuations.

    Args:
      rows: Tokens of the texts.
      expected: Logits of each text with its continuation, by transformers.
      logits: Function of a row of tokens to its logits, by this library.
      theirs: Continuations by transformers.
      ours: Continuations by this library.
    """
    worst, same, close = 0.0, 0, []
    for row, wanted, after, own in zip(rows, expected, theirs, ours, strict=True):
        found = logits(np.concatenate([row, after]))
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
        different = np.flatnonzero(own != after)
        if not len(different):
            same += 1
            continue
        best = np.sort(wanted[len(row) + different[0] - 1])[-2:]
        close.append(f"{best[1] - best[0]:.1e}")
    lines = [
        f"logits: the largest difference is {worst:.1e} of the largest logit, over"
        f" {sum(len(wanted) for wanted in expected):,} tokens",
        f"greedy continuations: {same} of {len(rows)} are the same",
    ]
    if close:
        lines.append(f"where others part, the two best logits differ by {', '.join(close)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
