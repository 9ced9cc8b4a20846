"""Runs the TPU compiler in a separate process: `python -m peft_jax.plan.worker folder`."""

import json
import sys
from pathlib import Path

from peft_jax.cost import find_topology
from peft_jax.models import build_model
from peft_jax.parallel import make_mesh
from peft_jax.training.blueprint import draw_blueprint
from peft_jax.training.config import RunConfig


def main(folder: str) -> None:
    """Compiles the step of the folder's task, and dumps the compiler's reports there."""
    task = json.loads((Path(folder) / "task.json").read_text(encoding="utf-8"))
    config = RunConfig.from_mapping(task["config"])
    model = build_model(task["hf_config"], config.execution)
    mesh = make_mesh(config.parallel, find_topology(task["topology"]).devices)
    lowered = draw_blueprint(config, model, mesh).trace_step().lower()
    lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})


if __name__ == "__main__":
    main(sys.argv[1])
