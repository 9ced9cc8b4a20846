"""Compares speed with other libraries: `make bench`, or `python -m benchmarks.run`.

It first times the rotation alone, over widths and tokens (`benchmarks.rotation`), and then training
steps and generation, beside Hugging Face PEFT, transformers and Tunix. Each comparison starts two
processes, lets both compile and warm up, and runs them in turn, so that changes of the machine's
speed affect both. The result is the ratio of each pair.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import ROOT, Comparison, compare, table
from benchmarks.tunix_environment import tunix_python
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

ROTATION = "rotation"
OURS, PEFT, TUNIX = "benchmarks.step_ours", "benchmarks.step_peft", "benchmarks.step_tunix"
GENERATION = "benchmarks.generate_ours", "benchmarks.generate_transformers"
MODELS = {
    "small": "A Llama of 32 million parameters, 8 rows of 256 tokens",
    "smollm2": "The dimensions of SmolLM2-135M, 4 rows of 128 tokens",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
      name: Name in the table.
      ours: Module and method of our worker.
      theirs: Module and method of the other worker.
      model: One of `MODELS`.
    """

    name: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    model: str = "small"


ROWS = {
    "full": Row("full / PyTorch's", (OURS, "full"), (PEFT, "full")),
    "lora": Row("LoRA r 8 / PEFT's", (OURS, "lora"), (PEFT, "lora")),
    "dora": Row("DoRA r 8 / PEFT's", (OURS, "dora"), (PEFT, "dora")),
    "oft": Row("OFT b 32 / PEFT's", (OURS, "oft"), (PEFT, "oft")),
    # Without its CUDA extension PEFT's BOFT has one butterfly factor.
    "boft": Row("BOFT b 8, m 1 / PEFT's", (OURS, "boft_one"), (PEFT, "boft")),
    "boft_two": Row("BOFT b 8, m 2 / PEFT's with m 1", (OURS, "boft"), (PEFT, "boft")),
    "boft_lora": Row("BOFT b 8, m 2 / our LoRA r 8", (OURS, "boft"), (OURS, "lora")),
    "hybrid": Row("hybrid / our LoRA r 8", (OURS, "hybrid"), (OURS, "lora")),
    "unitary": Row("unitary / our LoRA r 8", (OURS, "unitary"), (OURS, "lora")),
    "tunix_full": Row("full / Tunix's", (OURS, "full"), (TUNIX, "full")),
    "tunix_lora": Row("LoRA r 8 / Tunix's", (OURS, "lora"), (TUNIX, "lora")),
    "generation": Row(
        "128 tokens from 128 / transformers'", (GENERATION[0], "generate"), (GENERATION[1], "-")
    ),
    "smollm2_lora": Row("LoRA r 8 / PEFT's", (OURS, "lora"), (PEFT, "lora"), "smollm2"),
    "smollm2_dora": Row("DoRA r 8 / PEFT's", (OURS, "dora"), (PEFT, "dora"), "smollm2"),
    "smollm2_oft": Row("OFT b 32 / PEFT's", (OURS, "oft"), (PEFT, "oft"), "smollm2"),
    "smollm2_boft": Row("BOFT b 8, m 1 / PEFT's", (OURS, "boft_one"), (PEFT, "boft"), "smollm2"),
    "smollm2_hybrid": Row("hybrid / our LoRA r 8", (OURS, "hybrid"), (OURS, "lora"), "smollm2"),
    "smollm2_tunix_lora": Row("LoRA r 8 / Tunix's", (OURS, "lora"), (TUNIX, "lora"), "smollm2"),
    "smollm2_generation": Row(
        "128 tokens from 128 / transformers'",
        (GENERATION[0], "generate"),
        (GENERATION[1], "-"),
        "smollm2",
    ),
}


@exits.command("benchmarks.run")
def main() -> None:
    """Runs the comparisons and writes their results."""
    parser = Arguments("benchmarks.run", description=__doc__)
    known = [ROTATION, *ROWS]
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
    rows = {key: ROWS[key] for key in options.only if key != ROTATION}
    needs_tunix = any(row.theirs[0] == TUNIX for row in rows.values())
    tunix = tunix_python(options.output.absolute() / "tunix") if needs_tunix else None
    done: dict[str, Comparison] = {}
    for key, row in rows.items():
        print(f"{key}: {row.name} …", file=sys.stderr, flush=True)
        size = ("--size", row.model)
        done[key] = compare(
            row.name,
            (*row.ours, *size),
            (*row.theirs, *size),
            rounds=options.rounds,
            steps=options.steps,
            their_python=tunix if row.theirs[0] == TUNIX else None,
        )
        ratios = done[key].ratios
        print(
            f"  {done[key].ratio:.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
            file=sys.stderr,
            flush=True,
        )
        _write(done, options.output)
    if done:
        print((options.output / "steps.md").read_text())


def _write(done: dict[str, Comparison], output: Path) -> None:
    """Writes the comparisons made so far, a table for each model."""
    output.mkdir(parents=True, exist_ok=True)
    parts = [_machine()]
    for model, title in MODELS.items():
        found = [comparison for key, comparison in done.items() if ROWS[key].model == model]
        if found:
            parts.append(f"{title}:\n\n{table(found)}")
    (output / "steps.md").write_text("\n\n".join(parts) + "\n")
    numbers = {
        key: {"ours": dataclasses.asdict(made.ours), "theirs": dataclasses.asdict(made.theirs)}
        for key, made in done.items()
    }
    (output / "steps.json").write_text(json.dumps(numbers))


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
        f"{os.cpu_count()} cores of {model}; {versions}. Random weights in float32, AdamW, all"
        " seven linear maps adapted. A step of generation continues all rows."
    )


if __name__ == "__main__":
    sys.exit(main())
