"""Collects what is measured, in the form of the published results."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax.data.recipes.metamath import TEMPLATE
from peft_jax.runtime.files import write_json
from peft_jax.training import RunConfig
from peft_jax.version import __version__

from .protocol import ANSWERED_TOGETHER, COMMIT, MOST_NEW_TOKENS, MOST_TOKENS

ROW = "row.json"


@dataclasses.dataclass(kw_only=True)
class Measured:
    """Measurements of a run, which grow with it.

    Attributes:
      trainable: Number of trainable parameters.
      total: Number of all parameters.
      losses: Loss of each step.
      rows: Number of rows trained on.
      tokens: Number of tokens of each step, with an end token for each row.
      seconds: Seconds of each step.
      memory: Bytes in use on the first device after each step; empty where it does not say.
      validation: Records of the validations, and of the test at the end.
      validation_seconds: Seconds of all validations.
    """

    trainable: int
    total: int
    losses: list[float] = dataclasses.field(default_factory=list)
    rows: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)
    validation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    validation_seconds: float = 0.0

    def add_step(
        self, loss: float, rows: int, tokens: int, seconds: float, memory: int | None
    ) -> None:
        """Adds a step."""
        self.losses.append(loss)
        self.rows += rows
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        if memory is not None:
            self.memory.append(memory)

    def mean_loss(self, steps: int) -> float:
        """Returns the mean loss of the last steps."""
        return float(np.mean(self.losses[-steps:]))

    def add_validation(self, step: int, accuracy: float, every: int, seconds: float) -> None:
        """Adds a validation after `every` steps."""
        spent = sum(self.seconds[-every:])
        self.validation_seconds += seconds
        self.validation.append(
            {
                "step": step,
                "valid accuracy": accuracy,
                "train loss": self.mean_loss(every),
                "train samples": self.rows,
                "train time": spent,
                "eval time": seconds,
                "tokens / sec": sum(self.tokens[-every:]) / spent,
                "mem allocated avg": _mean(self.memory[-every:]),
                "elapsed time": sum(self.seconds) + self.validation_seconds,
            }
        )

    def finish(self, accuracy: float, forgetting: float | None, every: int) -> None:
        """Adds the test."""
        self.validation.append(
            {
                "step": len(self.losses),
                "test accuracy": accuracy,
                "train loss": self.mean_loss(every or len(self.losses)),
                "train samples": self.rows,
                "train total tokens": sum(self.tokens),
                **({} if forgetting is None else {"forgetting": forgetting}),
            }
        )


def make_row(
    config: RunConfig,
    measured: Measured,
    *,
    name: str,
    workdir: Path,
    started: datetime.datetime,
    seconds: float,
) -> dict[str, Any]:
    """Returns the row of a run, with the keys of the published results.

    Memory is that of JAX's allocator, and None where a device does not report it. "peft_branch"
    names this library.

    Args:
      config: Configuration of the run.
      measured: Measurements of the run.
      name: Name of the experiment.
      workdir: Folder with the adapter or the model.
      started: Time at which the run began.
      seconds: Seconds of the whole run.
    """
    train, settings = config.train, config.applied_optimizer
    files = [*workdir.glob("adapter/*.safetensors"), *workdir.glob("model/*.safetensors")]
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "run_info": {
            "created_at": started.replace(microsecond=0).isoformat(),
            "total_time": seconds,
            "experiment_name": name,
            "peft_branch": f"peft_jax {__version__}",
            "train_config": {
                "model_id": config.model.path,
                "dtype": config.model.dtype,
                "max_seq_length": train.max_length,
                "batch_size": train.batch_size,
                "batch_size_eval": ANSWERED_TOGETHER,
                "max_steps": train.steps,
                "eval_steps": config.evaluate.every,
                "compile": True,
                "use_gc": config.execution.remat != "none",
                "query_template": TEMPLATE,
                "seed": config.seed,
                "grad_norm_clip": settings.clip_norm or 0.0,
                "optimizer_type": settings.name,
                "optimizer_kwargs": {
                    "lr": train.learning_rate,
                    "weight_decay": settings.weight_decay,
                },
                "lr_scheduler": settings.schedule.name,
                "use_amp": False,
                "generation_kwargs": {
                    "max_length": MOST_TOKENS,
                    "max_new_tokens": MOST_NEW_TOKENS,
                },
                "protocol_commit": COMMIT,
                "settings": config.to_mapping(),
            },
            "peft_config": _peft_config(config, workdir),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": _mean(measured.memory),
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": (
                int(np.percentile(measured.memory, 99)) if measured.memory else None
            ),
            "train_time": sum(measured.seconds),
            "file_size": sum(file.stat().st_size for file in files),
            "num_trainable_params": measured.trainable,
            "num_total_params": measured.total,
            "status": "success",
            "metrics": measured.validation,
        },
        "meta_info": {
            "model_info": {"sha": config.model.revision or None, "created_at": None},
            "dataset_info": {
                "metamath": {"sha": config.data.revision or None, "created_at": None},
                "gsm8k": {"sha": None, "created_at": None},
            },
            "package_info": {
                "peft-version": f"peft_jax {__version__}",
                "transformers-version": importlib.metadata.version("transformers"),
                "datasets-version": importlib.metadata.version("datasets"),
                "torch-version": f"jax {jax.__version__}",
                "bitsandbytes-version": None,
            },
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": device.device_kind,
            },
        },
    }


def write_row(workdir: Path, row: dict[str, Any]) -> None:
    """Writes `row.json` atomically."""
    write_json(workdir / ROW, row)


def memory_in_use() -> int | None:
    """Returns the bytes in use on the first device; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use")


def _peft_config(config: RunConfig, workdir: Path) -> dict[str, Any] | None:
    """Returns the adapter's configuration, with a type; None for full fine-tuning."""
    file = workdir / "adapter" / "adapter_config.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"peft_type": config.spec.method.name.upper(), **found}


def _mean(values: list[int]) -> int | None:
    """Returns the mean as an integer; None without values."""
    return int(np.mean(values)) if values else None
