"""The TPU compiler, asked for its decisions and not for machine code.

Nearly all of the time that compiling a step takes goes into machine code, which is of no use here.
What a plan needs, the program after the compiler's passes and the memory it lays out, is there in
seconds, and the compiler leaves both in a folder when asked to. So it runs in a process of its own,
which is ended once they are there.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peft_jax.models import Model
from peft_jax.training.config import RunConfig

_PROGRAM = "*after_optimizations.txt"
_MEMORY = "*after_optimizations-memory-usage-report.txt"
_AFTERWARDS = "*after_optimizations_after_buffer_assignment.txt"
"""Written after the two others: when it is there, they are whole."""
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions:
    """What the compiler made of a step.

    Attributes:
      program: after its passes, as HLO text; empty where it did not fit.
      total: bytes on one device at the peak; None where it did not fit.
      out_of_memory: what it would have needed; empty where it fits.
    """

    program: str
    total: int | None
    out_of_memory: str


def ask_compiler(config: RunConfig, model: Model, topology: str) -> Decisions:
    """Compiles the step of a run for a topology that is not here, up to machine code.

    Raises:
      RuntimeError: the compiler failed, and not for want of memory.
    """
    with tempfile.TemporaryDirectory(prefix="peft_jax_plan_") as name:
        folder = Path(name)
        task = {"config": config.to_mapping(), "hf_config": model.hf_config, "topology": topology}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        with (folder / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "peft_jax.plan.worker", name],
                stdout=said,
                stderr=said,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        try:
            while process.poll() is None and not any(folder.glob(_AFTERWARDS)):
                time.sleep(_POLL_SECONDS)
        finally:
            # Its work is done, or it is no longer wanted.
            process.kill()
            process.wait()
        return _read(folder)


def _read(folder: Path) -> Decisions:
    """What the compiler left in the folder."""
    if any(folder.glob(_AFTERWARDS)):
        (program,) = folder.glob(_PROGRAM)
        (memory,) = folder.glob(_MEMORY)
        return Decisions(
            program=program.read_text(encoding="utf-8"),
            total=read_total(memory.read_text(encoding="utf-8")),
            out_of_memory="",
        )
    said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
    if "RESOURCE_EXHAUSTED" in said:
        return Decisions(program="", total=None, out_of_memory=read_out_of_memory(said))
    raise RuntimeError(f"the TPU compiler failed:\n{said[-4000:]}")


def read_total(report: str) -> int:
    r"""The bytes of a device's memory that a program takes, from the compiler's report.

    Raises:
      RuntimeError: the report is not of the known form.

    Example:
      >>> read_total("Memory Space: default (color=0)\nTotal bytes: 1818775552 (1.69GiB)\n")
      1818775552
    """
    match = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report)
    if match is None:
        raise RuntimeError(f"the compiler's report on memory is not understood: {report[:200]!r}")
    return int(match[1])


def read_out_of_memory(message: str) -> str:
    """What the compiler says of the memory it would need.

    Example:
      >>> read_out_of_memory("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on "
      ...     "HBM, the total memory required for HLO temporaries (400.00G) exceeds available HBM "
      ...     "(15.75G). HLO module: jit__lambda.")
      'it needs 400.00 GiB where 15.75 are available'
    """
    for pattern in (
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)",
        r"Used ([\d.]+)G of ([\d.]+)G hbm",
    ):
        if match := re.search(pattern, message):
            return f"it needs {match[1]} GiB where {match[2]} are available"
    return message[message.index("RESOURCE_EXHAUSTED") :].splitlines()[0]
