"""Measures adapters on the held-out rows of a finished run."""

import dataclasses
from collections.abc import Callable

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree
from peft_jax.parallel import MeshSettings
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import read_json_object
from peft_jax.training.config import RunConfig
from peft_jax.training.evaluate import make_evaluator
from peft_jax.training.input_digests import pin
from peft_jax.training.prepare import prepare
from peft_jax.training.workdir import WorkDir

HeldOutLoss = Callable[[Tree, AdapterSpec, AdapterState], float]
"""Returns the held-out loss of (parameters of the base, specification, arrays), per target."""


def held_out_loss(workdir: WorkDir, *, model: str | None = None) -> HeldOutLoss:
    """Returns a function that measures adapters on the held-out rows of a run, on one device.

    Args:
      workdir: Work directory of the run.
      model: Folder of the base model, if it is no longer where the run found it.

    Raises:
      RefusedError: The run has no held-out rows, or its data or base model are not found.
    """
    try:
        config = RunConfig.from_mapping(read_json_object(workdir.config))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{workdir.config} is not a run's configuration: {error}") from error
    config = pin(config, workdir.read_inputs(), ())
    config = dataclasses.replace(config, parallel=MeshSettings(devices=1))
    if model is not None:
        moved = dataclasses.replace(config.model, path=model, revision="")
        config = dataclasses.replace(config, model=moved)
    job = prepare(config, say=lambda _: None)
    job.train.close()
    if not len(job.held_out):
        raise RefusedError(f"the run in {workdir.path} has no held-out rows")

    def measure(params: Tree, spec: AdapterSpec, state: AdapterState) -> float:
        evaluate = make_evaluator(job, spec=spec)
        measured = evaluate(spec.frozen(params), state)
        assert measured is not None  # nothing stops it
        return measured["loss"]

    return measure
