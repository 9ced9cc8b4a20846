"""Measures the memory traffic of the hybrid's projection on a TPU, compared with LoRA's.

    python -m benchmarks.hybrid_traffic --chip v5p

It compiles one adapted linear map, forward and backward, with the TPU compiler for LoRA, BOFT and
the hybrid, with the XLA and the Pallas rotation. It prints the main memory held and accessed, which
shows whether the hybrid needs its own kernel.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import use_implementation
from kernels_pallas.memory_traffic import read_traffic
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for
from peft_jax.adapters import make_method
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

METHODS = {
    "LoRA": ("lora", {"rank": 16}),
    "BOFT": ("boft", {"block_size": 8, "n_butterfly_factors": 2}),
    "hybrid": ("hybrid", {"rank": 16, "block_size": 8, "n_butterfly_factors": 2}),
}


def compiled(chip: str, name: str, implementation: str, tokens: int, d: int) -> Any:
    """Compiles the projection of one kernel [d, d] with gradients of input and adapter."""
    key, settings = METHODS[name]
    method = make_method(key, **settings)
    gradient = None
    trainable, constant = jax.eval_shape(
        lambda: _without_gradient(method).init(jax.random.key(0), (d, d), gradient)
    )
    leaves, tree = jax.tree.flatten((trainable, constant))

    def step(x: jax.Array, base: jax.Array, g: jax.Array, *leaves: jax.Array) -> Any:
        trainable, constant = jax.tree.unflatten(tree, leaves)

        def project(x: jax.Array, trainable: Any) -> jax.Array:
            arrays = _without_gradient(method).prepare(trainable, constant)
            return _without_gradient(method).project(x, base, arrays)

        y, transpose = jax.vjp(project, x, trainable)
        return y, transpose(g)

    x = jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16)
    base = jax.ShapeDtypeStruct((d, d), jnp.bfloat16)
    with use_implementation(implementation):
        return compile_for(chip, step, x, base, x, *leaves)


def _without_gradient(method: Any) -> Any:
    """Returns the hybrid without gradient initialization, which has the same products."""
    import dataclasses

    if hasattr(method, "gradient_init"):
        return dataclasses.replace(method, gradient_init=False)
    return method


@exits.command("benchmarks.hybrid_traffic")
def main() -> None:
    """Prints the table."""
    parser = Arguments("benchmarks.hybrid_traffic", description=__doc__)
    parser.add_argument(
        "--chip", choices=list(TOPOLOGIES), default="v5p", help="kind of TPU to compile for"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens")
    parser.add_argument("--width", type=int, default=8192, help="number of features, in and out")
    options = parser.parse_args()
    x = 2 * options.tokens * options.width
    print(f"{options.chip}, {options.tokens} tokens, d {options.width}; in units of x, {x} bytes\n")
    print("| | arguments and results | temporaries | accessed |\n| --- | --- | --- | --- |")
    for name in METHODS:
        for implementation in ("xla",) if name == "LoRA" else ("xla", "pallas"):
            found = compiled(options.chip, name, implementation, options.tokens, options.width)
            held = read_traffic(found)
            accessed = (found.cost_analysis() or {})["bytes accessed"]
            cells = [held.arguments + held.results, held.temporaries, accessed]
            shown = " | ".join(f"{cell / x:.2f}" for cell in cells)
            print(f"| {name}, {implementation} | {shown} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
