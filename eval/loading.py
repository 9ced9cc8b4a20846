"""Finds and loads the model to evaluate."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax

from peft_jax.generation import Loaded, load_for_generation
from peft_jax.generation.from_tokens import context_length
from peft_jax.generation.loading import base_of, choose_quantization
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.adapter_base import recorded_quantization
from peft_jax.hub.load import open_sources
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import build_model
from peft_jax.models.registry import is_encoder
from peft_jax.parallel import batch_sharding, make_mesh
from peft_jax.runtime.buckets import is_bucket
from peft_jax.runtime.files import read_json_object

from .settings import EvalSettings

_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Files and settings of a model and its adapter.

    Attributes:
      model: Folder of the checkpoint.
      adapter: Folder of the adapter; None without one.
      tokenizer: Hugging Face tokenizer.
      context: Context length in tokens; None if positions are unbounded.
      quantization: Quantization of the base model.
      split_special_tokens: Whether control tokens in prompts are tokenized as characters.
      adapter_url: URL of an adapter in a bucket, of which `adapter` is a copy.
    """

    model: Path
    adapter: Path | None
    tokenizer: Any
    context: int | None
    quantization: str
    split_special_tokens: bool
    adapter_url: str = ""

    def identity(self) -> dict[str, Any]:
        """Returns the folders with digests of their files, to detect a changed model."""
        found: dict[str, Any] = {
            "model": str(self.model.resolve()),
            "model_digest": _digest(self.model),
        }
        if self.adapter is not None:
            found |= {
                "adapter": self.adapter_url or str(self.adapter.resolve()),
                # Every copy has other times.
                "adapter_digest": (_digest_contents if self.adapter_url else _digest)(self.adapter),
            }
        if self.quantization != "none":
            found["quantization"] = self.quantization
        if self.split_special_tokens:
            found["split_special_tokens"] = True
        return found


def find_model(settings: EvalSettings) -> ModelFiles:
    """Finds the model, and rejects an unsuitable one before large files are read.

    Raises:
      ValueError: A folder is missing, or the model cannot be evaluated.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"evaluation runs in one process but there are {jax.process_count()}; start one on"
            " one host, with all of its devices"
        )
    name, adapter_name = settings.source
    adapter = None if adapter_name is None else find_folder(adapter_name)
    folder = find_folder(name if name is not None else base_of(adapter))  # type: ignore[arg-type]
    config = read_config(folder)
    if is_encoder(config):
        raise ValueError(
            f"{folder} is an encoder, but this command evaluates models that generate text;"
            " train.py evaluates an encoder on held-out rows (docs/encoders.md)"
        )
    model = build_model(config, None)
    open_sources(folder, model)
    with_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        adapter if with_tokenizer and adapter else folder, chat_template=settings.chat_template
    )
    if settings.chat and not tokenizer.chat_template:
        raise ValueError(
            f"--chat is given, but the tokenizer of {folder} has no chat template; give a file with"
            " one as --chat_template"
        )
    split = _split_special_tokens(settings)
    if split and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"--split_special_tokens needs a fast tokenizer, but that of {folder} is"
            f" {type(tokenizer).__name__}; give --no-split_special_tokens"
        )
    return ModelFiles(
        model=folder,
        adapter=adapter,
        tokenizer=tokenizer,
        context=context_length(model, {}),
        quantization=_quantization(settings, adapter),
        split_special_tokens=split,
        adapter_url=adapter_name if adapter_name and is_bucket(adapter_name) else "",
    )


def _quantization(settings: EvalSettings, adapter: Path | None) -> str:
    """Returns the quantization that was given, or that of training.

    A run of peft_jax 0.1 recorded it in its configuration, not with its adapter.
    """
    asked = settings.quantization
    if asked is None and adapter is not None and recorded_quantization(adapter) is None:
        asked = _of_the_run(settings, "model").get("quantization")
    return choose_quantization(asked, adapter)


def _split_special_tokens(settings: EvalSettings) -> bool:
    """Returns the setting of that name as given, or as in training."""
    asked = settings.split_special_tokens
    if asked is None:
        asked = _of_the_run(settings, "data").get("split_special_tokens", False)
    return bool(asked)


def _of_the_run(settings: EvalSettings, part: str) -> dict[str, Any]:
    """Returns a section of the run's recorded configuration; empty if there is none."""
    config = None if settings.workdir is None else settings.workdir / "config.json"
    if config is None or not config.is_file():
        return {}
    found = read_json_object(config).get(part)
    return found if isinstance(found, dict) else {}


def load(settings: EvalSettings, files: ModelFiles) -> tuple[Loaded, jax.sharding.NamedSharding]:
    """Loads the model onto the devices.

    Returns:
      The model, and the sharding of batches.

    Raises:
      ValueError: The mesh does not fit the devices, or the model cannot be loaded.
    """
    if settings.quantization is None and files.quantization != "none":
        print(
            f"the base model is quantized to {files.quantization}, as in training;"
            " --quantization=none disables this",
            file=sys.stderr,
        )
    if settings.split_special_tokens is None and files.split_special_tokens:
        print(
            "control tokens in prompts are tokenized as characters, as in training;"
            " --no-split_special_tokens disables this",
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
    # `files.tokenizer` is the one that was checked.
    return dataclasses.replace(loaded, tokenizer=files.tokenizer), batch_sharding(mesh)


def _digest(folder: Path) -> str:
    """Returns a digest of the names, sizes and modification times of a folder's files."""
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _digest_contents(folder: Path) -> str:
    """Returns a digest of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
