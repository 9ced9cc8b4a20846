"""Fine-tunes from Python in a work directory."""

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
from peft_jax.training.method_section import default_learning_rate
from peft_jax.training.workdir import WorkDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of `train`.

    Attributes:
      model: Model.
      spec: Specification, with a classifier's head among `modules_to_save`.
      adapter: Trained arrays, for `AdapterSpec.bind` and `merge`.
      summary: Measurements of the run, as in `summary.json`.
      workdir: Work directory on disk; for one in a bucket, its local copy.
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
    """Fine-tunes a loaded model in a work directory, resuming from the latest checkpoint there.

    It does what `train.py` does, with checkpoints, held-out measurements and a report. `Trainer`
    trains in memory instead, on batches from any source. It also trains models that were not
    loaded from a checkpoint.

    Args:
      model: Model from `load_model` or `load_classifier`.
      params: Parameters from the same call. They are not changed. Frozen parameters are not copied
        if they already have the sharding of `parallel`.
      spec: Method, and the modules it applies to.
      data: Rows; see `dataset`.
      workdir: Folder for all files of the run, or the URL of one in a bucket.
      steps: Number of optimizer steps.
      epochs: Number of passes over the rows, in place of `steps`.
      learning_rate: Peak of the schedule; default: that of the method, or 1 for prodigy.
      batch_size: Number of rows in a step.
      max_length: Number of tokens in a row.
      gradient_accumulation: Number of microbatches that a step's rows are divided into.
      seed: Seed of the adapter's initial values, of dropout and of the order of the rows.
      optimizer: Optimizer settings, with the schedule; default: AdamW, whose learning rate decays
        linearly without a warm-up.
      mixing: Mixing of the hybrid's branches; default: the method's rates.
      evaluate: Evaluation settings. `peft-jax settings` lists the fields of this and the next
        sections.
      checkpoint: Checkpoint settings.
      parallel: Sizes of the mesh's axes.
      logging: Logging settings.
      export: Export settings.
      reporter: Prints messages; default: the terminal.
      allow_changed: "base", "data" or both, if they may have changed since the run began.

    Raises:
      ValueError: The model was not loaded from a checkpoint, or a setting is wrong.
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
        mixing=mixing or MixingSettings(),
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
        # The run trained the whole model, so it wrote no adapter.
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
    """Returns the name of the dtype of the base's parameters.

    Raises:
      ValueError: They have several dtypes, or one that runs do not support.
    """
    leaves = [leaf for leaf in flatten(params).values() if not isinstance(leaf, QArray)]
    found = {str(leaf.dtype) for leaf in leaves}
    if len(found) != 1 or found - {"float32", "bfloat16"}:
        raise ValueError(
            f"the parameters are of {', '.join(sorted(found))}; all must be float32, or all"
            " bfloat16: load_model(..., dtype=)"
        )
    return found.pop()
