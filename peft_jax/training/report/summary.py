"""Summarizes a run."""

import dataclasses
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from peft_jax.models import SequenceClassifier
from peft_jax.training.export import exported
from peft_jax.training.prepare import Job
from peft_jax.training.report.metrics import HELD_OUT, TRAIN, Record
from peft_jax.training.step_flops import measure_utilization

_PACKAGES = ("peft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_NOT_MEASURES = ("step", "split", "timing")


@dataclasses.dataclass
class Totals:
    """Counts over all parts of a resumed run.

    Attributes:
      tokens: Number of tokens of training steps, without padding.
      step_bytes: Bytes that the compiled step needs on each device; 0 if unknown.
      step_flops: Operations of the model and its gradient per step, see `StepArithmetic.total`;
        None if they could not be counted.
      seconds_to_first_step: Seconds from the start of the run's first part until its first step was
        finished; None if it did not finish one.
      clipped: Number of steps whose gradients were clipped, by group of the clipping.
      clip_steps: Number of steps that `clipped` counts among.
    """

    tokens: int = 0
    step_bytes: int = 0
    step_flops: float | None = None
    seconds_to_first_step: float | None = None
    clipped: dict[str, int] = dataclasses.field(default_factory=dict)
    clip_steps: int = 0

    def count_clipping(self, factors: Mapping[str, Any]) -> None:
        """Counts the groups of one step that were clipped.

        Args:
          factors: Factor on the gradients by group, as in the step's metrics.
        """
        self.clip_steps += 1
        for group, factor in factors.items():
            self.clipped[group] = self.clipped.get(group, 0) + int(float(factor) < 1.0)

    @property
    def clipped_share(self) -> dict[str, float]:
        """Share of the steps so far whose gradients were clipped, by group."""
        return {name: round(n / self.clip_steps, 6) for name, n in self.clipped.items()}


def summarize(
    job: Job, records: Sequence[Record], seconds: Mapping[str, float], totals: Totals
) -> dict[str, Any]:
    """Returns the summary of a finished run, as in `summary.json`.

    Args:
      job: Job of the run.
      records: Metrics of the run.
      seconds: Seconds by phase.
      totals: Counts of the run.

    Returns:
      "loss_before" and "loss_after" are on held-out data in nats per token, or None without such
      data. So are the recipe's metrics in "before" and "after". "tokens_per_second" and
      "seconds_per_step" include waiting for data, but exclude evaluation, checkpoints and
      compilation. "flops_per_second" covers the same time and counts the model and its gradient,
      including padding. "utilization" is its share of the vendor's bfloat16 peak rate, or None if
      that is unknown. "data" has the totals of the rows (of those read so far, if not all were
      checked before the first step) and the number of passes over the training rows. "exported"
      names the folders with the result; the first is the one to load. "seconds_to_first_step" is
      the time from the start of the run until its first step was finished: preparing, loading,
      initializing, compiling and the measurements before. "clipped" is the share of steps whose
      gradients were clipped, by group.
    """
    steps = job.steps
    before, after = _measures(records, 0), _measures(records, steps)
    training = seconds.get("train", 0.0) + seconds.get("data", 0.0)
    last = [record for record in records if record["split"] == TRAIN]
    return {
        "loss_before": before.get("loss"),
        "loss_after": after.get("loss"),
        "before": before,
        "after": after,
        "train_loss": last[-1]["loss"] if last else None,
        "trainable_parameters": job.count.trainable,
        "total_parameters": job.count.total,
        "trainable_percent": round(job.count.percent, 6),
        "steps": steps,
        "data": _data_totals(job),
        "rows_per_step": job.config.train.batch_size,
        "tokens": totals.tokens,
        "tokens_per_second": round(totals.tokens / training, 2) if training else None,
        "seconds_per_step": round(training / steps, 6),
        "seconds_to_first_step": totals.seconds_to_first_step,
        "flops_per_step": totals.step_flops,
        "clipped": totals.clipped_share,
        **_utilization(job, totals.step_flops, training / steps),
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "step_memory_bytes": totals.step_bytes or None,
        "method": job.config.spec.method.name,
        "model": job.config.model.path,
        "model_dtype": job.config.model.dtype,
        "quantization": job.config.model.quantization,
        "exported": list(exported(job.config)),
        "recipe": job.config.data.recipe,
        "labels": job.model.num_labels if isinstance(job.model, SequenceClassifier) else None,
        "devices": [f"{device.device_kind} {device.id}" for device in jax.devices()],
        "versions": versions(),
    }


def describe_data(job: Job) -> str:
    """Returns the numbers of rows and of passes over them as text."""
    train = job.config.train
    lines = [job.train.totals.describe(), job.held_out.totals.describe()]
    passes = job.train.passes(job.steps)
    kind = "packed rows" if job.train.packing else "rows"
    steps = "1 step" if job.steps == 1 else f"{job.steps:,} steps"
    length = f"{steps} of {train.batch_size:,} {kind}"
    if passes is None:
        lines.append(f"{length}; the number of passes is unknown, because no row was checked")
    else:
        about = "" if job.train.all_checked else "about "
        lines.append(f"{length}: {about}{passes:.3g} passes over the training rows")
    return "\n".join(lines)


def _data_totals(job: Job) -> dict[str, Any]:
    return {
        "train": job.train.totals.to_mapping(),
        "held_out": job.held_out.totals.to_mapping(),
        "epochs": job.config.train.epochs,
        "passes": job.train.passes(job.steps),
        "passes_estimated": not job.train.all_checked,
    }


def _utilization(job: Job, flops: float | None, seconds: float) -> dict[str, float | None]:
    if not seconds or flops is None:
        return {"flops_per_second": None, "utilization": None}
    measured = measure_utilization(flops, seconds, list(job.mesh.devices.flat))
    return {
        "flops_per_second": measured.flops_per_second,
        "utilization": measured.share_of_peak,
    }


def _measures(records: Sequence[Record], step: int) -> dict[str, Any]:
    for record in records:
        if record["split"] == HELD_OUT and record["step"] == step:
            return {k: v for k, v in record.items() if k not in _NOT_MEASURES}
    return {}


def peak_memory() -> dict[str, int | None]:
    """Returns the peak memory of this process on the host, and of one device if known, in bytes."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": max(peaks) if peaks else None}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the main packages."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
