"""The result of a run as files for others: the adapter, or the whole model, or both."""

import shutil

import jax

from peft_jax.adapters import AdapterState
from peft_jax.core import Tree
from peft_jax.hub import export_merged, save_adapter
from peft_jax.runtime.files import atomic_folder, remove_unfinished
from peft_jax.training.config import RunConfig
from peft_jax.training.prepare import Job
from peft_jax.training.workdir import WorkDir

_GENERATION_CONFIG = "generation_config.json"
"""What ends a chat model's turns often stands there alone."""


def export_results(job: Job, folder: WorkDir, frozen: Tree, adapter: AdapterState) -> None:
    """Writes `adapter/` and `model/`, whichever the run leaves, each with the tokenizer.

    Args:
      job: what the run was made of.
      folder: where it works.
      frozen: the base's parameters, without those that are trained themselves.
      adapter: the adapter's arrays; every process has to call this with its part of them.
    """
    if exports_adapter(job.config):
        everywhere = jax.NamedSharding(job.mesh, jax.P())
        whole = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(adapter)
        if jax.process_index() == 0:
            _export_adapter(job, folder, whole)
    if exports_model(job.config) and jax.process_index() == 0:
        _export_model(job, folder, frozen, adapter)


def exports_model(config: RunConfig) -> bool:
    """Whether a run leaves the whole model; one process alone can write it."""
    merged = config.export.merged
    if merged is None:
        merged = config.spec.method.trains_base and jax.process_count() == 1
    return merged


def exports_adapter(config: RunConfig) -> bool:
    """Whether a run leaves an adapter; full weights are in the whole model, and written once."""
    return not (config.spec.method.trains_base and exports_model(config))


def exported(config: RunConfig) -> tuple[str, ...]:
    """The names of the folders that a run leaves, the one to load first."""
    present = {"model": exports_model(config), "adapter": exports_adapter(config)}
    return tuple(name for name, there in present.items() if there)


def _export_adapter(job: Job, folder: WorkDir, adapter: AdapterState) -> None:
    """The adapter, in a folder that is there when it is whole."""
    settings = job.config.model
    save_adapter(
        folder.adapter,
        job.model,
        job.spec,
        adapter,
        settings.path,
        quantization=settings.quantization,
    )
    job.tokenizer.save_pretrained(folder.adapter)
    remove_unfinished(folder.adapter)  # the work directory is this run's alone


def _export_model(job: Job, folder: WorkDir, frozen: Tree, adapter: AdapterState) -> None:
    """The merged model in the base's dtype, in a folder that is there when it is whole."""
    with atomic_folder(folder.model) as temporary:
        dtype = job.config.model.dtype
        export_merged(temporary, job.model, frozen, job.spec, adapter, dtype=dtype)
        job.tokenizer.save_pretrained(temporary)
        if (job.folder / _GENERATION_CONFIG).is_file():
            shutil.copyfile(job.folder / _GENERATION_CONFIG, temporary / _GENERATION_CONFIG)
    remove_unfinished(folder.model)
