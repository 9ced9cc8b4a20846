r"""Plans memory, operations and time of methods on large models, without hardware.

    python -m benchmarks.plans --output=out/plans

It plans each configuration with each method on its topology, in the configuration's layout for the
method, then other models with LoRA and the hybrid, and prints the tables of docs/planning.md. Plans
that exist as `out/plans/MODEL-ROW.json` are not computed again.
"""

import dataclasses
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from peft_jax.cost import find_topology
from peft_jax.parallel.mesh import describe_shape
from peft_jax.plan import make_plan
from peft_jax.plan.text import table
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments
from peft_jax.training import from_config_dict

METHODS = ("full", "lora", "lora_ga", "boft", "unitary", "hybrid")

Settings = dict[str, str | int]

RECOMPUTED: Settings = {"execution.remat": "full", "train.gradient_accumulation": 1}
"""Layout with little memory that gathers weights once per pass: one microbatch, recomputed."""

WIDE: Settings = {"parallel.fsdp": 16, "parallel.tensor": 8}
"""Mesh of full fine-tuning at 405B."""

Rows = dict[str, tuple[str, Settings]]
"""A method and settings that replace those of the configuration, by name of the row."""

ALL_METHODS: Rows = {method: (method, {}) for method in METHODS}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to plan.

    Attributes:
      config: Name of the configuration.
      topology: Devices to plan for.
      rows: What is planned.
      settings: Settings that replace those of the configuration in all rows.
    """

    config: str
    topology: str
    rows: Rows
    settings: Settings = dataclasses.field(default_factory=dict)


def other_model(topology: str, *, fsdp: int, tensor: int, factors: int = 3) -> Subject:
    """Returns a subject that no configuration names, with four rows for each group of devices.

    Args:
      topology: Devices to plan for.
      fsdp: Size of the mesh axis of that name.
      tensor: Size of the mesh axis of that name.
      factors: Butterfly factors of the hybrid, whose blocks must divide the model's widths.
    """
    of_mesh: Settings = {"parallel.fsdp": fsdp, "parallel.tensor": tensor}
    rows: Rows = {
        "lora": ("lora", {}),
        "hybrid": ("hybrid", {"method.n_butterfly_factors": factors}),
    }
    size: Settings = {"train.batch_size": 4 * fsdp}
    return Subject("hybrid_70b", topology, rows, of_mesh | RECOMPUTED | size)


FURTHER_ROWS: dict[str, Rows] = {
    "hybrid_405b": {
        "lora, remat none": (
            "lora",
            WIDE | {"execution.remat": "none", "train.gradient_accumulation": 4},
        ),
        "hybrid, remat full": ("hybrid", WIDE | RECOMPUTED),
        "lora, base in w8a8g8": ("lora", {"model.quantization": "w8a8g8"}),
        "hybrid, base in w8a8": ("hybrid", {"model.quantization": "w8a8"}),
        "hybrid, base in w8a8g8": ("hybrid", {"model.quantization": "w8a8g8"}),
        "hybrid, base in nf4": ("hybrid", {"model.quantization": "nf4"}),
    },
    "hybrid_70b": {
        "hybrid, remat full": ("hybrid", RECOMPUTED),
        "lora, base in w8a8g8": ("lora", {"model.quantization": "w8a8g8"}),
        "hybrid, base in w8a8g8": ("hybrid", {"model.quantization": "w8a8g8"}),
    },
    "hybrid_30b": {"hybrid, base in w8a8g8": ("hybrid", {"model.quantization": "w8a8g8"})},
}

SUBJECTS = {
    name: Subject(name, topology, ALL_METHODS | FURTHER_ROWS.get(name, {}))
    for name, topology in {
        "hybrid_405b": "v5p:4x4x8",
        "hybrid_70b": "v5p:4x4x4",
        "hybrid_30b": "v5p:2x4x4",
        "hybrid_7b": "v5e:4x4",
    }.items()
} | {
    "gemma-3-27b": other_model("v5p:2x2x4", fsdp=4, tensor=4),
    "qwen3-30b-a3b": other_model("v5p:2x2x4", fsdp=4, tensor=4),
    "qwen3-235b-a22b": other_model("v5p:4x4x4", fsdp=16, tensor=4),
    "gpt-oss-120b": other_model("v5p:4x4x4", fsdp=16, tensor=4, factors=2),
    "deepseek-v3": other_model("v5p:4x4x8", fsdp=32, tensor=4),
}
"""Models by name: that of a configuration, or of an architecture."""


def plan_all(folder: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """Returns the plans by model and row; each is saved as soon as it is computed.

    Args:
      folder: Folder of the plans.
      only: Regular expression; rows whose "model/row" it does not match are skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans: dict[str, dict[str, Any]] = {}
    for name, subject in SUBJECTS.items():
        for row, (method, settings) in subject.rows.items():
            if not re.search(only, f"{name}/{row}"):
                continue
            file = folder / f"{name}-{row.replace(', ', '-').replace(' ', '_')}.json"
            if not file.is_file():
                plan = _plan(name, subject, method, settings)
                file.write_text(json.dumps(plan, indent=2), encoding="utf-8")
            plans.setdefault(name, {})[row] = json.loads(file.read_text(encoding="utf-8"))
    return plans


def _plan(name: str, subject: Subject, method: str, settings: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    module = importlib.import_module(f"configs.{subject.config}")
    config = module.get_config(f"method={method}")
    if name != subject.config:
        config.model.architecture = name
    config.update_from_flattened_dict({**subject.settings, **settings})
    plan = make_plan(from_config_dict(config), find_topology(subject.topology)).to_mapping()
    plan["planning_seconds"] = round(time.perf_counter() - started, 1)
    return plan


HEAD = (
    "method",
    "mesh",
    "remat",
    "microbatches",
    "GiB a chip",
    "of full",
    "TFLOP a step",
    "of full",
    "s a step",
    "of full",
    "utilization",
    "products",
    "memory",
    "transfers",
    "hidden",
)
"""Columns of a model's table; the last four are seconds."""


def rows_of(plans: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of one model's table, each compared with full fine-tuning."""
    full = plans.get("full")
    rows = [list(HEAD)]
    for method, plan in plans.items():
        memory, estimate = plan["memory_a_device"]["total"], plan["estimate"]
        flops = plan["flops_a_step"]["total"]
        own = [
            method,
            describe_shape(plan["mesh"]),
            plan["remat"],
            str(plan["gradient_accumulation"]),
        ]
        if memory is None:
            own += ["does not fit", ""]
        else:
            whole = full and full["memory_a_device"]["total"]
            own += [f"{memory / 2**30:.1f}", f"{memory / whole:.0%}" if whole else ""]
        whole = full and full["flops_a_step"]["total"]
        own += [f"{flops / 1e12:,.0f}", f"{flops / whole:.0%}" if whole else ""]
        if estimate is None:
            own += [""] * 7
        else:
            seconds, kinds = estimate["seconds"], estimate["by_kind"]
            whole = full and full["estimate"] and full["estimate"]["seconds"]
            own += [
                f"{seconds:.2f}",
                f"{seconds / whole:.0%}" if whole else "",
                f"{estimate['utilization']:.0%}",
                f"{kinds['products']:.2f}",
                f"{kinds['memory'] + kinds['elementwise']:.2f}",
                f"{estimate['transfers_not_hidden']:.2f}",
                f"{estimate['transfers_hidden']:.2f}",
            ]
        rows.append(own)
    return rows


def rows_by_part(plans: dict[str, Any]) -> list[list[str]]:
    """Returns the seconds of each method by part of the model."""
    times = {
        method: {part: sum(kinds.values()) for part, kinds in plan["estimate"]["by_part"].items()}
        for method, plan in plans.items()
        if plan["estimate"] is not None
    }
    longest = {
        part: max(parts.get(part, 0.0) for parts in times.values())
        for part in dict.fromkeys(part for parts in times.values() for part in parts)
    }
    columns = [part for part in sorted(longest, key=lambda p: -longest[p]) if longest[part] >= 0.01]
    rows = [["method", *columns]]
    for method, parts in times.items():
        rows.append([method, *(f"{parts.get(part, 0.0):.2f}" for part in columns)])
    return rows


@exits.command("benchmarks.plans")
def main() -> None:
    """Computes missing plans, and prints the tables."""
    parser = Arguments("benchmarks.plans", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("out/plans"), help="folder of the results"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help='rows to plan, as "hybrid_405b/(full|hybrid)$"',
    )
    given = parser.parse_args()
    for name, plans in plan_all(given.output, given.only).items():
        one = next(iter(plans.values()))
        tokens = f"{one['batch_size']} rows of {one['max_length']} tokens"
        source = f"configs/{SUBJECTS[name].config}.py"
        print(f"\n**{one['model']}** on {one['topology']}, {tokens} ({source})\n")
        print(table(rows_of(plans)))
        print("\nSeconds by part of the model:\n")
        print(table(rows_by_part(plans)))


if __name__ == "__main__":
    sys.exit(main())
