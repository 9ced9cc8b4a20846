"""Compares speed with Hugging Face PEFT: `make bench`, or `python -m benchmarks.run`.

It first times the rotation alone, over widths and tokens (`benchmarks.rotation`), and then training
steps. Each comparison of steps starts two processes, lets both compile and warm up, and runs them
in turn, so that changes of the machine's speed affect both. The result is the ratio of each pair.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import ROOT, Comparison, compare, table
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

ROTATION = "rotation"
OURS, THEIRS = "benchmarks.step_ours", "benchmarks.step_peft"
COMPARISONS = {
    "full": ("full / PEFT full", (OURS, "full"), (THEIRS, "full")),
    "lora": ("LoRA r 8 / PEFT LoRA r 8", (OURS, "lora"), (THEIRS, "lora")),
    # Without its CUDA extension PEFT's BOFT has one butterfly factor.
    "boft": ("BOFT b 8, m 1 / PEFT BOFT b 8, m 1", (OURS, "boft_one"), (THEIRS, "boft")),
    "boft_two": ("BOFT b 8, m 2 / PEFT BOFT b 8, m 1", (OURS, "boft"), (THEIRS, "boft")),
    "boft_lora": ("BOFT b 8, m 2 / our LoRA r 8", (OURS, "boft"), (OURS, "lora")),
    "hybrid": ("hybrid / our LoRA r 8", (OURS, "hybrid"), (OURS, "lora")),
    "unitary": ("unitary / our LoRA r 8", (OURS, "unitary"), (OURS, "lora")),
}


@exits.command("benchmarks.run")
def main() -> None:
    """Runs the comparisons and writes their results."""
    parser = Arguments("benchmarks.run", description=__doc__)
    known = [ROTATION, *COMPARISONS]
    parser.add_argument(
        "--only", nargs="+", choices=known, default=known, help="comparisons to make"
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs per comparison")
    parser.add_argument("--steps", type=int, default=2, help="steps in each half of a pair")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    if ROTATION in options.only:
        # Runs in a separate process, so that no other has the threads of both libraries.
        command = [
            sys.executable,
            "-m",
            "benchmarks.rotation",
            "--output",
            str(options.output.absolute()),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    done: list[Comparison] = []
    for key in options.only:
        if key == ROTATION:
            continue
        name, ours, theirs = COMPARISONS[key]
        print(f"{name} …", file=sys.stderr, flush=True)
        done.append(compare(name, ours, theirs, rounds=options.rounds, steps=options.steps))
        print(
            f"  {done[-1].ratio:.2f} ({min(done[-1].ratios):.2f} – {max(done[-1].ratios):.2f})",
            file=sys.stderr,
            flush=True,
        )
    if not done:
        return
    text = f"{_machine()}\n\n{table(done)}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "steps.md").write_text(text)
    (options.output / "steps.json").write_text(
        json.dumps({c.name: {"ours": c.ours.seconds, "theirs": c.theirs.seconds} for c in done})
    )
    print(text)


def _machine() -> str:
    import importlib.metadata as metadata

    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("jax", "torch", "peft", "transformers")
    )
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{os.cpu_count()} cores of {model}; {versions}. A Llama of 32 million parameters in"
        " float32, batch 8 x 256, AdamW, all seven linear maps adapted."
    )


if __name__ == "__main__":
    sys.exit(main())
