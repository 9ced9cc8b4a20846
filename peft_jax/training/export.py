"""Exports the result of a run: the adapter, the merged model, or both."""

import shutil

import jax

from peft_jax.adapters import AdapterState
from peft_jax.core import Tree
from peft_jax.hub import export_merged, save_adapter
from peft_jax.hub.model_card import ModelCard, write_card
from peft_jax.runtime.files import atomic_folder, remove_unfinished
from peft_jax.training.config import RunConfig
from peft_jax.training.prepare import Job
from peft_jax.training.workdir import WorkDir

_GENERATION_CONFIG = "generation_config.json"
"""File that often alone names the end token of a chat model's turns."""


def export_results(job: Job, folder: WorkDir, frozen: Tree, adapter: AdapterState) -> None:
    """Writes `adapter/` and `model/`, as configured, each with the tokenizer.

    Args:
      job: Job of the run.
      folder: Work directory.
      frozen: Frozen parameters of the base model.
      adapter: Arrays of the adapter. Every process must call this with its shards.
    """
    if exports_adapter(job.config):
        everywhere = jax.NamedSharding(job.mesh, jax.P())
        whole = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(adapter)
        if jax.process_index() == 0:
            _export_adapter(job, folder, whole)
    if exports_model(job.config) and jax.process_index() == 0:
        _export_model(job, folder, frozen, adapter)


def exports_model(config: RunConfig) -> bool:
    """Returns whether a run exports the merged model, which only a single process can write."""
    merged = config.export.merged
    if merged is None:
        merged = config.spec.method.trains_base and jax.process_count() == 1
    return merged


def exports_adapter(config: RunConfig) -> bool:
    """Returns whether a run exports an adapter; full weights are only in the exported model."""
    return not (config.spec.method.trains_base and exports_model(config))


def exported(config: RunConfig) -> tuple[str, ...]:
    """Returns the names of the exported folders; the first is the one to load."""
    present = {"model": exports_model(config), "adapter": exports_adapter(config)}
    return tuple(name for name, there in present.items() if there)


def _export_adapter(job: Job, folder: WorkDir, adapter: AdapterState) -> None:
    """Writes the adapter atomically."""
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
    remove_unfinished(folder.adapter)  # no other run writes in the work directory


def _export_model(job: Job, folder: WorkDir, frozen: Tree, adapter: AdapterState) -> None:
    """Writes the merged model atomically, in the base model's dtype."""
    with atomic_folder(folder.model) as temporary:
        dtype = job.config.model.dtype
        export_merged(temporary, job.model, frozen, job.spec, adapter, dtype=dtype)
        job.tokenizer.save_pretrained(temporary)
        if (job.folder / _GENERATION_CONFIG).is_file():
            shutil.copyfile(job.folder / _GENERATION_CONFIG, temporary / _GENERATION_CONFIG)
        card = ModelCard(
            kind="model",
            base=job.config.model.path,
            base_folder=job.folder,
            spec=job.spec,
            run=job.config.to_mapping(),
        )
        write_card(temporary, card)
    remove_unfinished(folder.model)
