"""The model to be evaluated: its files, before they are read, and its arrays on the devices."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax

from eval.settings import EvalSettings
from peft_jax.generation import Loaded, load_for_generation
from peft_jax.generation.from_tokens import context_length
from peft_jax.generation.loading import base_of, choose_quantization
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.adapter_base import recorded_quantization
from peft_jax.hub.files import read_json_object
from peft_jax.hub.load import open_sources
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import build_model
from peft_jax.models.registry import is_encoder
from peft_jax.parallel import batch_sharding, make_mesh

_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model and its adapter are.

    Attributes:
      model: the checkpoint's folder.
      adapter: the adapter's folder; None without one.
      tokenizer: its transformers tokenizer.
      context: how many tokens it was made for; None where its positions have no end.
      quantization: how the base's kernels are held.
    """

    model: Path
    adapter: Path | None
    tokenizer: Any
    context: int | None
    quantization: str

    def identity(self) -> dict[str, str]:
        """The folders, and a digest of what is in them, by which a changed model is noticed."""
        found = {"model": str(self.model.resolve()), "model_digest": _digest(self.model)}
        if self.adapter is not None:
            found |= {
                "adapter": str(self.adapter.resolve()),
                "adapter_digest": _digest(self.adapter),
            }
        if self.quantization != "none":
            found["quantization"] = self.quantization
        return found


def find_model(settings: EvalSettings) -> ModelFiles:
    """Finds the model, and refuses what cannot be loaded before anything large is read.

    Raises:
      ValueError: a folder is missing, or does not hold what it should.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "evaluation runs in one process, with all the devices of its host; this program has"
            f" {jax.process_count()}"
        )
    name, adapter_name = settings.source
    adapter = None if adapter_name is None else find_folder(adapter_name)
    folder = find_folder(name if name is not None else base_of(adapter))  # type: ignore[arg-type]
    config = read_config(folder)
    if is_encoder(config):
        raise ValueError(
            f"{folder} is an encoder, which writes no text to be evaluated here: train.py measures"
            " one on held-out rows while it is fine-tuned (docs/encoders.md)"
        )
    model = build_model(config, None)
    open_sources(folder, model)
    with_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        adapter if with_tokenizer and adapter else folder, chat_template=settings.chat_template
    )
    if settings.chat and not tokenizer.chat_template:
        raise ValueError(
            f"--chat: the tokenizer of {folder} has no chat template: name a file with one in"
            " --chat_template"
        )
    return ModelFiles(
        model=folder,
        adapter=adapter,
        tokenizer=tokenizer,
        context=context_length(model),
        quantization=_quantization(settings, adapter),
    )


def _quantization(settings: EvalSettings, adapter: Path | None) -> str:
    """How the base's kernels are held: as asked, or as they were while the adapter was trained.

    A run of peft_jax 0.1 has not written it down with its adapter, but in its configuration.
    """
    asked = settings.quantization
    if asked is None and settings.workdir is not None and adapter is not None:
        config = settings.workdir / "config.json"
        if recorded_quantization(adapter) is None and config.is_file():
            model = read_json_object(config).get("model")
            asked = model.get("quantization") if isinstance(model, dict) else None
    return choose_quantization(asked, adapter)


def load(settings: EvalSettings, files: ModelFiles) -> tuple[Loaded, jax.sharding.NamedSharding]:
    """Loads the model onto the devices.

    Returns:
      The model, and how rows of batches are shared out.

    Raises:
      ValueError: the devices cannot be shared out as asked, or the model cannot be loaded.
    """
    if settings.quantization is None and files.quantization != "none":
        print(
            f"the base's kernels are held in {files.quantization}, as the adapter was trained;"
            " --quantization=none for as they are",
            file=sys.stderr,
        )
    mesh = make_mesh(settings.mesh)
    loaded = load_for_generation(
        files.model,
        files.adapter,
        merge=settings.merge,
        dtype=settings.dtype,
        mesh=mesh,
        quantization=files.quantization,
        chat_template=settings.chat_template,
    )
    # The one that was looked at, with the chat template it was given.
    return dataclasses.replace(loaded, tokenizer=files.tokenizer), batch_sharding(mesh)


def _digest(folder: Path) -> str:
    """A digest of the names, sizes and times of a folder's files."""
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
