"""Measures generation with another adapter for each row, against one merged model.

    python -m benchmarks.adapters_by_row

The same prompts are continued greedily by a random Llama of `benchmarks.small_llama`: with one
adapter merged, with one bound, and with 1, 8 and 64 adapters chosen by row. Every variant is
measured in turn, several times, and the table shows the medians.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

COUNTS = (1, 8, 64)


@exits.command("benchmarks.adapters_by_row")
def main() -> None:
    """Measures every variant and prints a table."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = Arguments("benchmarks.adapters_by_row", description=__doc__)
    parser.add_argument("--size", choices=("small", "large", "8b"), default="small", help="model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype")
    parser.add_argument("--rows", type=int, default=64, help="prompts of the batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a continuation")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each variant")
    given = parser.parse_args()
    found = measure(given)
    merged = found["merged"]
    setting = f"{given.rows} rows of {given.prompt} + {given.new} tokens, rank {given.rank}"
    print(f"| {setting} | prompt s | decode s | tokens/s | of merged |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (prompt, decode) in found.items():
        rate = given.rows * given.new / (prompt + decode)
        share = sum(merged) / (prompt + decode)
        print(f"| {name} | {prompt:.3f} | {decode:.3f} | {rate:,.0f} | {share:.2f} |")


def measure(given: Any) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of prompts and of decoding, by variant."""
    import jax
    import numpy as np

    import peft_jax as pj
    from benchmarks.small_llama import SIZES

    config = SIZES[given.size].config
    model = pj.build_model(config, pj.ExecutionSettings(compute_dtype=given.dtype))
    params = model.init_params(jax.random.key(0), given.dtype)
    spec = pj.AdapterSpec(pj.LoRA(rank=given.rank))
    rng = np.random.default_rng(0)

    def draw() -> pj.AdapterState:
        """Returns random factors that change the logits a little."""
        return jax.tree.map(
            lambda leaf: jax.numpy.asarray(0.01 * rng.standard_normal(leaf.shape), leaf.dtype),
            spec.abstract(params),
        )

    adapters = {f"adapter {number}": (spec, draw()) for number in range(max(COUNTS))}
    names = list(adapters)
    state = adapters[names[0]][1]
    variants: dict[str, tuple[Any, dict[str, Any]]] = {
        "merged": (spec.merge(params, state), {}),
        "bound": (spec.bind(params, state), {}),
    }
    for count in COUNTS:
        stacked = pj.stack_adapters(params, {name: adapters[name] for name in names[:count]})
        rows = [names[row % count] for row in range(given.rows)]
        variants[f"{count} by row"] = (params, {"adapters": stacked, "row_adapters": rows})
    prompts = list(rng.integers(1, config["vocab_size"], (given.rows, given.prompt)))
    settings = pj.GenerationSettings(max_new_tokens=given.new, eos_ids=(), batch_size=given.rows)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repeat in range(given.repeats + 1):
        for name, (bound, settings_of_rows) in variants.items():
            stats = pj.generate(model, bound, prompts, settings, **settings_of_rows).stats
            if repeat:  # the first one compiles
                seconds[name].append((stats.prompt_seconds, stats.decode_seconds))
    return {
        name: (statistics.median(p for p, _ in own), statistics.median(d for _, d in own))
        for name, own in seconds.items()
    }


if __name__ == "__main__":
    main()
