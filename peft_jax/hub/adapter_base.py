"""Records which base an adapter was trained on, and warns when it is loaded onto another."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.core import FORMATS, Tree, forward_format
from peft_jax.hub.adapter_files import CONFIG, PEFT_CONFIG
from peft_jax.hub.converted import MANIFEST, WEIGHTS, is_converted
from peft_jax.hub.digests import sample_tensors
from peft_jax.models import TrainableModel, quantization_of
from peft_jax.runtime.files import read_json_object

_log = logging.getLogger(__name__)


def base_digest(folder: Path) -> str | None:
    """Returns the digest of a base's weights; for a converted checkpoint, that of its source.

    Args:
      folder: Folder of the checkpoint, as returned by `find_folder`.

    Returns:
      The digest, or None for a converted checkpoint that was rounded or written by peft_jax 0.1.

    Raises:
      ValueError: The folder holds no checkpoint.
    """
    if not is_converted(folder):
        return sample_tensors(folder)
    weights = read_json_object(folder / MANIFEST).get(WEIGHTS)
    return weights if isinstance(weights, str) else None


def digest_of_origin(model: TrainableModel) -> str | None:
    """Returns the digest of the weights that a model's parameters were read from.

    Returns:
      The digest, or None if the origin is unknown or unreadable. The latter is logged as a warning
      rather than raised, so that a trained adapter is not lost with its base.
    """
    if not model.origin:
        return None
    try:
        return base_digest(Path(model.origin))
    except (OSError, ValueError) as error:
        _log.warning("the weights in %s can no longer be read: %s", model.origin, error)
        return None


def check_same_base(folders: Mapping[str, Path]) -> None:
    """Raises ValueError if adapters were trained on different bases.

    The bases' digests are compared where they are recorded, and otherwise the bases' names.

    Args:
      folders: Folders of the adapters, by the names to use in messages.

    Raises:
      ValueError: Two bases differ; the message names the adapters and the bases.
    """
    seen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, folder in folders.items():
        file = folder / (CONFIG if (folder / CONFIG).is_file() else PEFT_CONFIG)
        config = read_json_object(file)
        kind = "base_digest" if config.get("base_digest") else "base_model_name_or_path"
        other, found = seen.setdefault(kind, (name, config))
        if found.get(kind) != config.get(kind):
            bases = [one.get("base_model_name_or_path") for one in (found, config)]
            raise ValueError(
                f"{other} was trained on {bases[0]} and {name} on {bases[1]}, whose {kind} differ"
                f" ({found.get(kind)} and {config.get(kind)}); adapters of one base go together"
            )


def recorded_quantization(folder: Path) -> str | None:
    """Returns the quantization of the base during training; None if not recorded.

    Args:
      folder: Folder of the adapter.

    Raises:
      ValueError: The recorded value is not a quantization format.
    """
    if not (folder / CONFIG).is_file():
        return None
    return _checked_quantization(folder, read_json_object(folder / CONFIG))


def _checked_quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization")
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(
            f"{folder / CONFIG} sets quantization = {quantization!r}; it must be one of"
            f" {', '.join(FORMATS)}"
        )
    return quantization


def warn_on_base_mismatch(
    folder: Path, config: Mapping[str, Any], model: TrainableModel, params: Tree
) -> None:
    """Logs a warning if an adapter is loaded onto another base than it was trained on.

    Args:
      folder: Folder of the adapter.
      config: Content of its `peft_jax_adapter.json`.
      model: Base model.
      params: Parameters of the base, as arrays or shapes.

    Raises:
      ValueError: The recorded quantization is not a format.
    """
    recorded = _checked_quantization(folder, config)
    trained_on = f"{config.get('base_model_name_or_path')} ({config.get('model_type')})"
    here = f"{model.origin or 'this model'} ({model.model_type})"
    if config.get("model_type") != model.model_type:
        _log.warning(
            "the adapter in %s was trained on %s but is loaded onto %s, a model of another family",
            folder,
            trained_on,
            here,
        )
        return
    held = quantization_of(params)
    if recorded is not None and forward_format(recorded) != forward_format(held):
        _log.warning(
            "the adapter in %s was trained on %s with quantization %s but is loaded onto %s with"
            " quantization %s, so the model computes another function",
            folder,
            trained_on,
            recorded,
            here,
            held,
        )
    weights = config.get("base_digest")
    found = None if weights is None else digest_of_origin(model)
    if found is not None and found != weights:
        _log.warning(
            "the adapter in %s was trained on %s, whose weights have the digest %s, but is loaded"
            " onto %s, whose weights differ (digest %s)",
            folder,
            trained_on,
            weights,
            here,
            found,
        )
