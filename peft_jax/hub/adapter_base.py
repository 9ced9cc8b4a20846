"""What an adapter remembers of the base it was made on, and what is said where it meets another."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.core import FORMATS, Tree
from peft_jax.hub.adapter_files import CONFIG
from peft_jax.hub.converted import MANIFEST, WEIGHTS, is_converted
from peft_jax.hub.digests import sample_tensors
from peft_jax.models import Model, quantization_of
from peft_jax.runtime.files import read_json_object

_log = logging.getLogger(__name__)


def base_digest(folder: Path) -> str | None:
    """Returns the digest of a base's weights; of a converted one, that of what it was made of.

    Args:
      folder: The checkpoint's, as `find_folder` returns it.

    Returns:
      None of a converted checkpoint that has other numbers than what it was made of, or that was
      made by peft_jax 0.1.

    Raises:
      ValueError: It holds no checkpoint.
    """
    if not is_converted(folder):
        return sample_tensors(folder)
    weights = read_json_object(folder / MANIFEST).get(WEIGHTS)
    return weights if isinstance(weights, str) else None


def digest_of_origin(model: Model) -> str | None:
    """Returns the digest of the weights that a model's parameters were read from.

    Returns:
      None where it is not known what they were read from, or that can no longer be read, which is
      a warning: a result is not lost with its base.
    """
    if not model.origin:
        return None
    try:
        return base_digest(Path(model.origin))
    except (OSError, ValueError) as error:
        _log.warning("the weights in %s can no longer be read: %s", model.origin, error)
        return None


def recorded_quantization(folder: Path) -> str | None:
    """Returns how the base of an adapter was quantized when it was trained; None if not recorded.

    Args:
      folder: The adapter's.

    Raises:
      ValueError: What is recorded is not a format.
    """
    if not (folder / CONFIG).is_file():
        return None
    quantization = read_json_object(folder / CONFIG).get("quantization")
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(
            f"{folder / CONFIG} sets quantization = {quantization!r}; it must be one of"
            f" {', '.join(FORMATS)}"
        )
    return quantization


def warn_of_another_base(
    folder: Path, config: Mapping[str, Any], model: Model, params: Tree
) -> None:
    """Warns where an adapter is loaded onto something else than the base that it was made on.

    Args:
      folder: The adapter's.
      config: The content of its `peft_jax_adapter.json`.
      model: The base.
      params: Its parameters, arrays or abstract ones.
    """
    made_on = f"{config.get('base_model_name_or_path')} ({config.get('model_type')})"
    here = f"{model.origin or 'this model'} ({model.family.model_type})"
    if config.get("model_type") != model.family.model_type:
        _log.warning(
            "the adapter in %s was made on %s and is loaded onto %s, which is of another family",
            folder,
            made_on,
            here,
        )
        return
    recorded = config.get("quantization")
    held = quantization_of(params)
    if recorded is not None and recorded != held:
        _log.warning(
            "the adapter in %s was trained on %s with quantization %s and is loaded onto %s with"
            " quantization %s: that is another function",
            folder,
            made_on,
            recorded,
            here,
            held,
        )
    weights = config.get("base_digest")
    found = None if weights is None else digest_of_origin(model)
    if found is not None and found != weights:
        _log.warning(
            "the adapter in %s was made on %s, whose weights have the digest %s, and is loaded onto"
            " %s, whose weights have the digest %s: they are not the same weights",
            folder,
            made_on,
            weights,
            here,
            found,
        )
