"""What a saved adapter consists of, and how its own configuration is written.

    peft_jax_adapter.json         the method, its settings, what it applies to; what is in the files
    peft_jax_adapter.safetensors  the arrays, where Hugging Face PEFT's form does not hold them all
    adapter_config.json           the same adapter for PEFT, where PEFT has the method
    adapter_model.safetensors     its arrays in PEFT's form

`peft_jax_adapter.json` has digests of the arrays and of the settings that are computed with; PEFT's
own files have none.

So a folder of LoRA, LoRA-GA or BOFT loads in `peft.PeftModel.from_pretrained` as it is. Where
PEFT's form gives back every array bit for bit (LoRA, LoRA-GA, BOFT with one factor), it is the only
copy. For BOFT with several factors PEFT's files are a copy, made for it, with the factors
multiplied together. For the other methods there are none, and `peft_jax_adapter.json` says why;
merged (`export_merged`), they are checkpoints like any other.

Tensors in `peft_jax_adapter.safetensors` are named by module and array, one a layer:
"model.layers.0.self_attn.q_proj.low_rank.a". The methods' docstrings say what each is; kernels act
on row vectors, y = x W, so that "a" is [in, rank]. Leaves that are trained themselves have the
names and the layout they have in the base's checkpoint.
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
    """The content of `peft_jax_adapter.json`.

    Args:
      spec: the method and what it applies to.
      model_type: of the base's `config.json`.
      base_model_name: where the base is, or its name on the hub.
      arrays_in: the file that holds the arrays, `ARRAYS` or `PEFT_ARRAYS`.
      arrays_digest: the digest of the arrays in it.
      peft: whether PEFT loads the folder, and why not.
      quantization: how the base's kernels were held while it was trained; None if not known.
      base_digest: the digest of the base's weights; None if not known.
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
    settings = digest_settings(_computed_with(config))
    return {**config, DIGESTS: {"arrays": arrays_digest, "settings": settings}}


def check_settings_digest(config: Mapping[str, Any], file: Path) -> str | None:
    """Checks that the settings that are computed with are those that were written.

    The names in the file, of the base above all, may be edited.

    Returns:
      The digest that the arrays have to have; None of an adapter of before there were digests.

    Raises:
      ValueError: a setting was changed.
    """
    digests = config.get(DIGESTS)
    if digests is None:
        return None
    if not isinstance(digests, Mapping) or not isinstance(digests.get("arrays"), str):
        raise ValueError(f"{file}: {DIGESTS} must have the arrays' and the settings'")
    if digests.get("settings") != digest_settings(_computed_with(config)):
        raise ValueError(
            f"{file} was changed since it was written: its settings do not have the digest"
            f" {digests.get('settings')}. Restore it, or save the adapter again"
        )
    return digests["arrays"]


def _computed_with(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what an adapter computes."""
    names = ("method", *_SPEC_FIELDS, "arrays", "quantization")
    return {name: config.get(name) for name in names}


def read_spec(config: Mapping[str, Any], file: Path) -> AdapterSpec:
    """The method and what it applies to, from the content of `peft_jax_adapter.json`.

    Raises:
      ValueError: it is of another format or a later version, or a setting is missing or unknown.
    """
    if config.get("format") != FORMAT:
        raise ValueError(f"{file} is no adapter's configuration: its format is not {FORMAT!r}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r} and was written by peft_jax"
            f" {config.get('peft_jax_version')}; this one ({__version__}) reads {FORMAT_VERSION}"
        )
    missing = [name for name in ("method", "arrays", *_SPEC_FIELDS) if name not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}{did_you_mean(missing[0], config)}")
    if not isinstance(config["method"], Mapping):
        raise ValueError(f"{file}: method must be an object; it is {config['method']!r}")
    try:
        given = {name: config[name] for name in _SPEC_FIELDS}
        return from_mapping(AdapterSpec, {"method": _read_method(config["method"]), **given})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_method(given: Mapping[str, Any]) -> TrainingMethod:
    """The method whose name and settings are given.

    Raises:
      ValueError: it or one of its settings is not known, or a setting is of the wrong type.
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
    """A setting as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
