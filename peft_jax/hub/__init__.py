"""Loads and saves Hugging Face checkpoints and adapters as safetensors.

- [`load`][peft_jax.hub.load]: `load_model`, `load_classifier`, `load_params`: stream
  tensors into stacked, sharded arrays.
- [`save`][peft_jax.hub.save]: `save_model` writes a checkpoint that transformers loads.
- [`adapter_save`][peft_jax.hub.adapter_save]: `save_adapter` writes an adapter for this library
  and, where it has the method, for Hugging Face PEFT; `export_merged` writes a merged model.
- [`originals`][peft_jax.hub.originals]: `original_kernels` reads single kernels as
  they are before they are quantized.
- [`adapter_load`][peft_jax.hub.adapter_load]: `load_adapter` reads both formats.
- [`checkpoint`][peft_jax.hub.checkpoint]: `read_config`, `open_checkpoint`.
- [`digests`][peft_jax.hub.digests]: detect changed base or data files by content.
- [`fetch`][peft_jax.hub.fetch]: `find_folder` finds a local folder or fetches one from the hub.
"""

from peft_jax.hub.adapter_load import load_adapter
from peft_jax.hub.adapter_save import export_merged, save_adapter
from peft_jax.hub.checkpoint import open_checkpoint, read_config
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.load import load_classifier, load_model, load_params
from peft_jax.hub.originals import original_kernels
from peft_jax.hub.save import save_model

__all__ = [
    "export_merged",
    "find_folder",
    "load_adapter",
    "load_classifier",
    "load_model",
    "load_params",
    "open_checkpoint",
    "original_kernels",
    "read_config",
    "save_adapter",
    "save_model",
]
