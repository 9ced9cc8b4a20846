"""Measures the memory traffic of the kernels on a TPU, compared with XLA and a lower bound.

    python -m benchmarks.kernel_traffic --chips v5p --matching bfloat16

It compiles every kernel, forward and backward, at the models' widths with the real TPU compiler
(the extra `tpu`, or libtpu; no TPU is needed). It writes `kernel_traffic.md` and `.jsonl` into the
output folder. Cases that are in the .jsonl are not compiled again.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels_pallas.memory_traffic import Program, measure
from kernels_pallas.tpu_compiler import TOPOLOGIES
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

KERNELS = ("block_rotation", "butterfly", "unitary")
IMPLEMENTATIONS = ("pallas", "xla")
Row = dict[str, Any]


@exits.command("benchmarks.kernel_traffic")
def main() -> None:
    """Compiles the selected cases and writes the table."""
    parser = Arguments("benchmarks.kernel_traffic", description=__doc__)
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="operations to compile"
    )
    parser.add_argument(
        "--chips",
        nargs="+",
        choices=list(TOPOLOGIES),
        default=list(TOPOLOGIES),
        help="kinds of TPU to compile for",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=list(IMPLEMENTATIONS),
        help="implementations to compile",
    )
    parser.add_argument("--matching", default="", help="only cases with this in their description")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "kernel_traffic.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {_key(row) for row in rows}
    with log.open("a") as lines:
        for row, program in _wanted(options):
            if _key(row) in done:
                continue
            row |= _measured(program, row["chip"], row["implementation"])
            rows.append(row)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print(json.dumps(row), file=sys.stderr)
    (options.output / "kernel_traffic.md").write_text(table(rows))
    print(table(rows))


def _wanted(options: argparse.Namespace) -> Iterator[tuple[Row, Program]]:
    for chip in options.chips:
        for kernel in options.kernels:
            for program in importlib.import_module(f"kernels_pallas.{kernel}.bench").programs():
                if options.matching not in program.case:
                    continue
                for implementation in options.implementations:
                    row = {
                        "chip": chip,
                        "kernel": program.kernel,
                        "case": program.case,
                        "direction": program.direction,
                        "implementation": implementation,
                    }
                    yield row, program


def _key(row: Row) -> tuple[str, ...]:
    names = ("chip", "kernel", "case", "direction", "implementation")
    return tuple(row[name] for name in names)


def _measured(program: Program, chip: str, implementation: str) -> Row:
    found = measure(chip, program, implementation)
    if found.pallas != (implementation == "pallas"):
        raise RuntimeError(f"{program} was not compiled as {implementation}")
    return {
        "minimum": program.minimum,
        **dataclasses.asdict(found.traffic),
        "accessed": found.accessed,
        "seconds": round(found.seconds, 2),
    }


def table(rows: list[Row]) -> str:
    """Returns a Markdown table with a line per program and its implementations side by side."""
    lines = [
        "| kernel | case | | chip | least, MB | Pallas: held | XLA: held | Pallas: accessed |"
        " XLA: accessed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    programs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        *program, implementation = _key(row)
        programs.setdefault(tuple(program), {})[implementation] = row
    for (chip, kernel, case, direction), found in programs.items():
        least = next(iter(found.values()))["minimum"]
        held = [
            _share(found.get(name), ("arguments", "results", "temporaries"), least)
            for name in IMPLEMENTATIONS
        ]
        accessed = [_share(found.get(name), ("accessed",), least) for name in IMPLEMENTATIONS]
        cells = [kernel, case, direction, chip, f"{least / 1e6:.0f}", *held, *accessed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(row: Row | None, names: tuple[str, ...], least: int) -> str:
    return "" if row is None else f"{sum(row[name] for name in names) / least:.2f}"


if __name__ == "__main__":
    sys.exit(main())
