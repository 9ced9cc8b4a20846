"""Generates greedily with transformers: `python -m benchmarks.generate_transformers generate`."""

import sys
import warnings

import torch

from benchmarks import small_llama as setup
from benchmarks.step_peft import make_model
from benchmarks.worker import await_turn, serve


def main(options: setup.Options) -> None:
    """Builds a model and prompts, and serves their continuation."""
    warnings.filterwarnings("ignore")
    model = make_model(options).eval()
    prompts = torch.as_tensor(setup.prompts(options.size), device=model.device)

    await_turn()

    def run() -> float:
        with torch.inference_mode():
            found = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=setup.NEW_TOKENS,
                max_new_tokens=setup.NEW_TOKENS,
                pad_token_id=0,
            )
        return float(found[:, prompts.shape[1] :].float().mean())

    serve(
        run,
        warm_up=1,
        device_peak=lambda: torch.cuda.max_memory_allocated() or None,
        library="transformers",
        method="generate",
    )


if __name__ == "__main__":
    main(setup.parse(sys.argv[1:]))
