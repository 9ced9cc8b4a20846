"""Fine-tuning from Python with everything a run leaves behind."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import jax
from qwix import QArray

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree, flatten
from peft_jax.data import DataSettings
from peft_jax.hub import load_adapter, load_params
from peft_jax.hub.fetch import hub_name
from peft_jax.models import Model, quantization_of
from peft_jax.optim import MixingSettings, OptimizerSettings
from peft_jax.parallel import MeshSettings
from peft_jax.runtime.buckets import copy_command
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.progress import Reporter
from peft_jax.training.config import RunConfig
from peft_jax.training.config_sections import (
    CheckpointSettings,
    EvaluateSettings,
    ExportSettings,
    LoggingSettings,
    ModelSettings,
    TrainSettings,
)
from peft_jax.training.export import exports_adapter
from peft_jax.training.loop import run
from peft_jax.training.method_section import default_learning_rate, mixing_rates
from peft_jax.training.workdir import WorkDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What `train` has made.

    Attributes:
      model: The model.
      spec: The specification, with a classifier's head among `modules_to_save`.
      adapter: The trained arrays, as `AdapterSpec.bind` and `merge` take them.
      summary: The result in numbers, as in `summary.json`.
      workdir: The work directory; of one in a bucket, the copy on disk.
    """

    model: Model
    spec: AdapterSpec
    adapter: AdapterState
    summary: dict[str, Any]
    workdir: Path


def train(
    model: Model,
    params: Tree,
    spec: AdapterSpec,
    *,
    data: DataSettings,
    workdir: str | Path,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    gradient_accumulation: int = 1,
    seed: int = 0,
    optimizer: OptimizerSettings | None = None,
    mixing: MixingSettings | None = None,
    evaluate: EvaluateSettings | None = None,
    checkpoint: CheckpointSettings | None = None,
    parallel: MeshSettings | None = None,
    logging: LoggingSettings | None = None,
    export: ExportSettings | None = None,
    reporter: Reporter | None = None,
    allow_changed: Collection[str] = (),
) -> TrainingResult:
    """Fine-tunes a loaded checkpoint in a work directory, resuming what was stopped there.

    It is the run of `train.py`, with checkpoints, held-out measurements and a report. `Trainer`
    trains in memory, also models that come from no checkpoint, on batches of any source.

    Args:
      model: The model, as `load_model` or `load_classifier` gave it.
      params: Its parameters as they gave them. They are not changed, and what stays frozen is not
        copied where it lies as `parallel` asks.
      spec: The method, and the modules it applies to.
      data: The rows; see `dataset`.
      workdir: The folder that everything is written to, or the URL of one in a bucket.
      steps: Number of optimizer steps.
      epochs: Number of passes over the rows, in place of `steps`.
      learning_rate: Peak of the schedule; by default the method's, or 1 for prodigy.
      batch_size: Number of rows in a step.
      max_length: Number of tokens in a row.
      gradient_accumulation: Number of microbatches that a step's rows are divided into.
      seed: Seed of the adapter's first values, of dropout and of the order of the rows.
      optimizer: The optimizer and its schedule.
      mixing: How the hybrid's branches are weighted; by default with the method's rates.
      evaluate: When held-out rows are measured; `python -m peft_jax.settings` lists the fields of
        this and the next sections.
      checkpoint: When checkpoints are written.
      parallel: The devices and what is sharded over them.
      logging: What is written down.
      export: What the result is written as.
      reporter: Where messages go; the terminal by default.
      allow_changed: "base" or "data", where they may have changed since the run began.

    Raises:
      ValueError: The model comes from no checkpoint, or a setting is wrong.
      RefusedError, InterruptedRunError, NonFiniteError, BadDataError, StorageError: As
        [`run`][peft_jax.training.loop.run] raises them.
    """
    if not model.origin:
        raise ValueError(
            "the model was not loaded from a checkpoint, so a run could not be resumed: save it"
            " with save_model and load it with load_model, or train in memory with Trainer"
        )
    quantization = quantization_of(params)
    model.check_params(params, quantization)
    path, revision = hub_name(model.origin) or (model.origin, "")
    optimizer = optimizer or OptimizerSettings()
    usual = default_learning_rate(spec.method, optimizer.name)
    config = RunConfig(
        seed=seed,
        model=ModelSettings(
            path=path,
            revision=revision,
            dtype=_dtype(params),
            quantization=cast(Any, quantization),
        ),
        execution=model.execution,
        spec=spec,
        mixing=mixing or MixingSettings(**mixing_rates(spec.method)),
        data=data,
        train=TrainSettings(
            steps=steps,
            epochs=epochs,
            learning_rate=usual if learning_rate is None else learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            max_length=max_length,
        ),
        optimizer=optimizer,
        evaluate=evaluate or EvaluateSettings(),
        checkpoint=checkpoint or CheckpointSettings(),
        parallel=parallel or MeshSettings(),
        logging=logging or LoggingSettings(),
        export=export or ExportSettings(),
    )
    summary = run(config, workdir, reporter=reporter, allow_changed=allow_changed, params=params)
    folder = WorkDir.at(workdir)
    if exports_adapter(config):
        # Only the first process has a copy on disk.
        url = f"{folder.url}/adapter" if folder.url and jax.process_index() else ""
        found, adapter = load_adapter(url or folder.adapter, model, params)
    else:
        # The whole model is what was trained.
        found = spec
        if folder.url and not any(folder.model.glob("*.safetensors")):
            raise RefusedError(
                f"{folder.url} has a finished run of another host; copy its model with"
                f" `{copy_command(f'{folder.url}/model')}`, and load that"
            )
        whole = load_params(folder.model, model, dtype=spec.dtype)
        adapter = AdapterState(trainable=whole, constant={})
    return TrainingResult(
        model=model, spec=found, adapter=adapter, summary=summary, workdir=folder.path
    )


def _dtype(params: Tree) -> Any:
    """Returns the name of the dtype that the base's parameters have.

    Raises:
      ValueError: They have several, or one that runs do not know.
    """
    leaves = [leaf for leaf in flatten(params).values() if not isinstance(leaf, QArray)]
    found = {str(leaf.dtype) for leaf in leaves}
    if len(found) != 1 or found - {"float32", "bfloat16"}:
        raise ValueError(
            f"the parameters are of {', '.join(sorted(found))}; all must be float32, or all"
            " bfloat16: load_model(..., dtype=)"
        )
    return found.pop()
