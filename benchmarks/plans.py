r"""Plans memory and operations of every method on the four large models, without hardware.

    python -m benchmarks.plans --out=out/plans

It plans each configuration with each method on its topology, and prints the tables of
docs/planning.md. Plans that exist as `out/plans/MODEL-METHOD.json` are not computed again.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from peft_jax.cost import find_topology
from peft_jax.plan import make_plan
from peft_jax.plan.text import table
from peft_jax.runtime import exits
from peft_jax.training import from_config_dict

TOPOLOGIES = {
    "hybrid_405b": "v5p:4x4x8",
    "hybrid_70b": "v5p:4x4x4",
    "hybrid_30b": "v5p:2x4x4",
    "hybrid_7b": "v5e:4x4",
}
METHODS = ("full", "lora", "lora_ga", "boft", "unitary", "hybrid")
QUANTIZED = {"hybrid_405b": ("hybrid", "nf4")}
"""Methods that are also planned over a quantized base model, by configuration."""


def plan_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the plans by configuration and method; each is saved as soon as it is computed."""
    folder.mkdir(parents=True, exist_ok=True)
    plans: dict[str, dict[str, Any]] = {}
    for name, topology in TOPOLOGIES.items():
        rows = [(method, method, "none") for method in METHODS]
        if name in QUANTIZED:
            method, quantization = QUANTIZED[name]
            rows.append((f"{method}, base in {quantization}", method, quantization))
        for row, method, quantization in rows:
            file = folder / f"{name}-{method}-{quantization}.json"
            if not file.is_file():
                plan = _plan(name, topology, method, quantization)
                file.write_text(json.dumps(plan, indent=2), encoding="utf-8")
            plans.setdefault(name, {})[row] = json.loads(file.read_text(encoding="utf-8"))
    return plans


def _plan(name: str, topology: str, method: str, quantization: str) -> dict[str, Any]:
    started = time.perf_counter()
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config(f"method={method}")
    config.model.quantization = quantization
    plan = make_plan(from_config_dict(config), find_topology(topology)).to_mapping()
    plan["planning_seconds"] = round(time.perf_counter() - started, 1)
    return plan


def rows_of(plans: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of one model's table, each compared with full fine-tuning."""
    head = ["method", "GiB a chip", "of full", "TFLOP a step", "of full", "s a step", "times less"]
    full = plans["full"]
    rows = [head]
    for method, plan in plans.items():
        memory, time_ = plan["memory_a_device"]["total"], plan["estimate"]
        flops = plan["flops_a_step"]["total"]
        own = [method]
        if memory is None:
            own += ["does not fit", ""]
        else:
            whole = full["memory_a_device"]["total"]
            own += [f"{memory / 2**30:.1f}", f"{memory / whole:.0%}" if whole else ""]
        own += [f"{flops / 1e12:,.0f}", f"{flops / full['flops_a_step']['total']:.0%}"]
        if time_ is None or full["estimate"] is None:
            own += ["" if time_ is None else f"{time_['seconds']:.2f}", ""]
        else:
            ratio = full["estimate"]["seconds"] / time_["seconds"]
            own += [f"{time_['seconds']:.2f}", f"{ratio:.2f}"]
        rows.append(own)
    return rows


@exits.command("benchmarks.plans")
def main() -> None:
    """Computes missing plans, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/plans"))
    for name, plans in plan_all(parser.parse_args().out).items():
        one = plans["full"]
        tokens = f"{one['batch_size']} rows of {one['max_length']} tokens"
        print(f"\n**{one['model']}** on {one['topology']}, {tokens} (configs/{name}.py)\n")
        print(table(rows_of(plans)))


if __name__ == "__main__":
    sys.exit(main())
