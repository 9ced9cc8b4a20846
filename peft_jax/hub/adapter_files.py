"""Files of a saved adapter, and its configuration `peft_jax_adapter.json`.

    peft_jax_adapter.json         method, its settings, target modules, digests
    peft_jax_adapter.safetensors  arrays, unless PEFT's files hold all of them exactly
    adapter_config.json           the same adapter for Hugging Face PEFT, if PEFT has the method
    adapter_model.safetensors     arrays in PEFT's format

`peft_jax_adapter.json` has digests of the arrays and of the settings that affect the computation.
PEFT's files have no digests.

A folder of a method that PEFT has loads in `peft.PeftModel.from_pretrained` unchanged. If PEFT's
format restores every array bit for bit (LoRA, LoRA-GA, BOFT with one factor), it is the only copy.
Otherwise PEFT's files hold a second copy, for BOFT with several factors one in which the factors
are multiplied. The other methods have no PEFT files, and `peft_jax_adapter.json` says why.
`export_merged` writes any method as an ordinary checkpoint.

Tensors in `peft_jax_adapter.safetensors` are named by module and array, one per layer:
"model.layers.0.self_attn.q_proj.low_rank.a". The methods' docstrings describe the arrays. Kernels
act on row vectors, y = x W, so "a" is [in, rank]. Fully trainable leaves have the names and the
layout of the base's checkpoint.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.adapters import (
    METHODS,
    AdapterSpec,
    TrainingMethod,
    make_method,
    method_settings,
)
from peft_jax.core import did_you_mean
from peft_jax.core.typed_settings import convert, from_mapping
from peft_jax.hub.adapter_digests import DIGESTS, digest_settings
from peft_jax.version import __version__

CONFIG = "peft_jax_adapter.json"
ARRAYS = "peft_jax_adapter.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_ARRAYS = "adapter_model.safetensors"

FORMAT = "peft_jax adapter"
FORMAT_VERSION = 1

_SPEC_FIELDS = tuple(
    field.name for field in dataclasses.fields(AdapterSpec) if field.name != "method"
)

_LATER_FIELDS = frozenset(
    {"layers_to_transform", "bias", "trainable_token_indices", "share_experts"}
)
"""Settings that adapters of earlier versions do not have."""


def write_config(
    spec: AdapterSpec,
    *,
    model_type: str,
    base_model_name: str,
    arrays_in: str,
    arrays_digest: str,
    peft: Mapping[str, Any],
    quantization: str | None,
    base_digest: str | None,
) -> dict[str, Any]:
    """Returns the content of `peft_jax_adapter.json`.

    Args:
      spec: Adapter specification.
      model_type: `model_type` of the base's `config.json`.
      base_model_name: Path of the base, or its name on the hub.
      arrays_in: Name of the file with the arrays, `ARRAYS` or `PEFT_ARRAYS`.
      arrays_digest: Digest of the arrays.
      peft: Whether PEFT loads the folder and, if not, why.
      quantization: Storage format of the base's kernels during training; None if unknown.
      base_digest: Digest of the base's weights; None if unknown.
    """
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_jax_version": __version__,
        "base_model_name_or_path": base_model_name,
        "base_digest": base_digest,
        "model_type": model_type,
        "quantization": quantization,
        "method": {"name": spec.method.name, **dataclasses.asdict(spec.method)},
        **{name: _plain(getattr(spec, name)) for name in _SPEC_FIELDS},
        "arrays": arrays_in,
        "peft": dict(peft),
    }
    settings = digest_settings(_digested_settings(config))
    return {**config, DIGESTS: {"arrays": arrays_digest, "settings": settings}}


def check_settings_digest(config: Mapping[str, Any], file: Path) -> str | None:
    """Raises ValueError if a setting that affects the computation was edited.

    Names in the file, such as the base's, may be edited.

    Args:
      config: Content of `peft_jax_adapter.json`.
      file: Its path, for messages.

    Returns:
      The recorded digest of the arrays; None for an adapter of version 0.1, which has no digests.
    """
    digests = config.get(DIGESTS)
    if digests is None:
        return None
    if not isinstance(digests, Mapping) or not isinstance(digests.get("arrays"), str):
        raise ValueError(
            f"{file}: {DIGESTS} must be an object with arrays and settings; it is {digests!r}"
        )
    if digests.get("settings") != digest_settings(_digested_settings(config)):
        raise ValueError(
            f"{file} was changed since it was written: the digest of its settings is not"
            f" {digests.get('settings')}; restore the file, or save the adapter again"
        )
    return digests["arrays"]


def _digested_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that affect what an adapter computes."""
    names = ("method", *_SPEC_FIELDS, "arrays", "quantization")
    return {name: config.get(name) for name in names if name in config or name not in _LATER_FIELDS}


def read_spec(config: Mapping[str, Any], file: Path) -> AdapterSpec:
    """Reads the adapter specification from the content of `peft_jax_adapter.json`.

    Raises:
      ValueError: The format or version is not supported, or a setting is missing or unknown.
    """
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{file} has the format {config.get('format')!r}, but an adapter's configuration has"
            f" {FORMAT!r}"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r} (written by peft_jax"
            f" {config.get('peft_jax_version')}), but peft_jax {__version__} reads version"
            f" {FORMAT_VERSION}"
        )
    needed = [name for name in _SPEC_FIELDS if name not in _LATER_FIELDS]
    missing = [name for name in ("method", "arrays", *needed) if name not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}{did_you_mean(missing[0], config)}")
    if not isinstance(config["method"], Mapping):
        raise ValueError(f"{file}: method must be an object; it is {config['method']!r}")
    try:
        given = {name: config[name] for name in _SPEC_FIELDS if name in config}
        return from_mapping(AdapterSpec, {"method": _read_method(config["method"]), **given})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_method(given: Mapping[str, Any]) -> TrainingMethod:
    """Builds the method from its name and settings.

    Raises:
      ValueError: The method or a setting is unknown, or a setting has the wrong type.
    """
    settings = {name: value for name, value in given.items() if name != "name"}
    name = str(given.get("name"))
    if name in METHODS:
        annotations = typing.get_type_hints(METHODS[name])
        known = method_settings(name)
        for setting in settings.keys() & set(known):
            settings[setting] = convert(
                settings[setting], annotations[setting], where=f"method.{setting}"
            )
    return make_method(name, **settings)


def _plain(value: Any) -> Any:
    """Returns a setting as a JSON value."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
