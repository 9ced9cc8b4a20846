"""Hugging Face checkpoints and adapters, in and out, as safetensors.

- [`load`][peft_jax.hub.load]: `load_model`, `load_classifier`, `load_params`, streamed into
  stacked, sharded arrays.
- [`save`][peft_jax.hub.save]: `save_model`, a checkpoint that transformers reads.
- [`adapter_save`][peft_jax.hub.adapter_save]: `save_adapter`, for this library and, where it has
  the method, Hugging Face PEFT; `export_merged`, as a whole model.
- [`adapter_load`][peft_jax.hub.adapter_load]: `load_adapter`, from either.
- [`checkpoint`][peft_jax.hub.checkpoint]: `read_config`, `open_checkpoint`.
- [`digests`][peft_jax.hub.digests]: whether a base or data files are what they were, by content.
- [`fetch`][peft_jax.hub.fetch]: `find_folder`, a local folder or one from the hub.
"""

from peft_jax.hub.adapter_load import load_adapter
from peft_jax.hub.adapter_save import export_merged, save_adapter
from peft_jax.hub.checkpoint import open_checkpoint, read_config
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.load import load_classifier, load_model, load_params
from peft_jax.hub.save import save_model

__all__ = [
    "export_merged",
    "find_folder",
    "load_adapter",
    "load_classifier",
    "load_model",
    "load_params",
    "open_checkpoint",
    "read_config",
    "save_adapter",
    "save_model",
]
