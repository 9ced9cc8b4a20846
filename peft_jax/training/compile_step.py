"""Compiles a run's step, and rejects one that does not fit in memory."""

from collections.abc import Callable

import jax

from peft_jax.cost.memory import device_memory
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.prepare import Job
from peft_jax.training.program import step_bytes
from peft_jax.training.report.summary import Totals
from peft_jax.training.step_flops import count_step_flops


def compile_step(job: Job, totals: Totals, *, warn: Callable[[str], None]) -> jax.stages.Compiled:
    """Compiles the step, and counts its memory and operations in `totals`.

    Args:
      job: A prepared run.
      totals: Receives the step's bytes and operations.
      warn: Is told why operations cannot be counted.

    Raises:
      RefusedError: The step needs more memory than a device has.
    """
    traced = job.trace_step()
    compiled = traced.lower().compile()
    needed, memory = step_bytes(compiled), device_memory()
    if needed is not None and memory is not None:
        totals.step_bytes = needed
        _check_fits(needed, memory)
    totals.step_flops = count_step_flops(job, traced, say=warn)
    return compiled


def _check_fits(needed: int, memory: int) -> None:
    """Rejects a step that needs more memory than a device has, before it runs."""
    local = len(jax.local_devices()) if jax.local_devices()[0].platform == "cpu" else 1
    if needed * local > memory:
        raise RefusedError(
            f"a step needs {needed / 2**30:.1f} GiB on each device, but a device has "
            f"{memory / local / 2**30:.1f}: raise train.gradient_accumulation, lower "
            'train.max_length, set execution.remat to "full", or use more devices'
        )
