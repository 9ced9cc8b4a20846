"""Runs the TPU compiler up to its memory report, without generating machine code.

Nearly all of a step's compile time goes into machine code, which a plan does not need. A plan needs
the optimized program and the memory report. The compiler dumps both to a folder within seconds. So
it runs in a separate process, which is killed once they are written.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.models import Model
from peft_jax.training.config import RunConfig

_PROGRAM = "*after_optimizations.txt"
_MEMORY = "*after_optimizations-memory-usage-report.txt"
_AFTERWARDS = "*after_optimizations_after_buffer_assignment.txt"
"""File written after the two others, whose presence means that they are complete."""
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilerReport:
    """The compiler's report of a step.

    Attributes:
      program: Optimized HLO text; empty if the step does not fit.
      total: Peak memory of one device in bytes; None if the step does not fit.
      out_of_memory: Memory that the step needs, as text; empty if it fits.
    """

    program: str
    total: int | None
    out_of_memory: str


def compile_for_topology(config: RunConfig, model: Model, topology: str) -> CompilerReport:
    """Compiles the step of a run for an absent topology, up to machine code.

    Raises:
      RuntimeError: The compiler failed for another reason than memory.
    """
    task = {"config": config.to_mapping(), "hf_config": model.hf_config, "topology": topology}
    return compile_task("peft_jax.plan.worker", task)


def compile_task(module: str, task: Mapping[str, Any]) -> CompilerReport:
    """Compiles a program in a process of its own, up to machine code.

    Args:
      module: Module to run with a folder as its argument. It reads the task from `task.json` there,
        and compiles with the folder as `xla_dump_to`.
      task: JSON values.

    Raises:
      RuntimeError: The compiler failed for another reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="peft_jax_plan_") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        with (folder / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", module, name],
                stdout=said,
                stderr=said,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        try:
            while process.poll() is None and not any(folder.glob(_AFTERWARDS)):
                time.sleep(_POLL_SECONDS)
        finally:
            # Its report is written, or no longer needed.
            process.kill()
            process.wait()
        return _read(folder)


def _read(folder: Path) -> CompilerReport:
    """Reads the compiler's report in the folder."""
    if any(folder.glob(_AFTERWARDS)):
        (program,) = folder.glob(_PROGRAM)
        (memory,) = folder.glob(_MEMORY)
        return CompilerReport(
            program=program.read_text(encoding="utf-8"),
            total=read_total(memory.read_text(encoding="utf-8")),
            out_of_memory="",
        )
    said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
    if "RESOURCE_EXHAUSTED" in said:
        return CompilerReport(program="", total=None, out_of_memory=read_out_of_memory(said))
    raise RuntimeError(f"the TPU compiler failed:\n{said[-4000:]}")


def read_total(report: str) -> int:
    r"""Returns a program's bytes of device memory from the compiler's memory report.

    Raises:
      RuntimeError: The report has an unknown form.

    Example:
      >>> read_total("Memory Space: default (color=0)\nTotal bytes: 1818775552 (1.69GiB)\n")
      1818775552
    """
    match = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report)
    if match is None:
        raise RuntimeError(f"the compiler's memory report has an unknown form: {report[:200]!r}")
    return int(match[1])


def read_out_of_memory(message: str) -> str:
    """Returns the memory that a program needs from the compiler's error message.

    Example:
      >>> read_out_of_memory("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on "
      ...     "HBM, the total memory required for HLO temporaries (400.00G) exceeds available HBM "
      ...     "(15.75G). HLO module: jit__lambda.")
      'it needs 400.00 GiB, but 15.75 GiB are available'
    """
    for pattern in (
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)",
        r"Used ([\d.]+)G of ([\d.]+)G hbm",
    ):
        if match := re.search(pattern, message):
            return f"it needs {match[1]} GiB, but {match[2]} GiB are available"
    return message[message.index("RESOURCE_EXHAUSTED") :].splitlines()[0]
