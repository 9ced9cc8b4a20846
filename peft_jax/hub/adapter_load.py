"""Loading an adapter that this library, or Hugging Face PEFT, has written."""

import logging
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from peft_jax.adapters import AdapterSpec, AdapterState, Targets
from peft_jax.core import Path, Tree, flatten
from peft_jax.hub.adapter_arrays import (
    ArrayTensors,
    adapted_tensors,
    check_tensors,
    make_state,
    modules_of,
    read_arrays,
    read_tensor,
    stack,
    trained_tensors,
)
from peft_jax.hub.adapter_base import warn_of_another_base
from peft_jax.hub.adapter_digests import digest_arrays
from peft_jax.hub.adapter_files import (
    ARRAYS,
    CONFIG,
    PEFT_ARRAYS,
    PEFT_CONFIG,
    check_settings_digest,
    read_spec,
)
from peft_jax.hub.adapter_save import peft_trained_tensors
from peft_jax.hub.checkpoint import PICKLED
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.peft_config import check_peft_config, check_unchanged, write_peft_config
from peft_jax.hub.peft_forms import peft_form
from peft_jax.hub.peft_import import check_tied, spec_of, without_base_copies
from peft_jax.hub.peft_names import PEFT_PREFIX
from peft_jax.hub.tensors import StoredTensor, read_header
from peft_jax.models import Model
from peft_jax.runtime.files import read_json_object

_log = logging.getLogger(__name__)


def load_adapter(
    folder: str | FilePath, model: Model, params: Tree
) -> tuple[AdapterSpec, AdapterState]:
    """An adapter from a folder, or from the Hugging Face hub.

    What `save_adapter` wrote comes back bit for bit: digests tell whether its arrays or settings
    were changed since. A base of another family, or with other weights, is a warning. Of Hugging
    Face PEFT's own adapters LoRA (plain, rank-stabilized, with patterns and modules_to_save) and
    BOFT are read; a setting that changes what is computed and is not implemented is refused by
    name. Nothing is ever unpickled.

    Args:
      folder: where it is, or its name on the hub.
      model: the base it was made for.
      params: the base's parameters, arrays or abstract ones.

    Returns:
      What is adapted, and the adapter's arrays: `spec.bind(params, state)` is the adapted model.

    Raises:
      ValueError: the folder holds no adapter, or not one of this base: the modules or tensors that
        are missing, left over or of another shape are named. Or it is damaged, was changed, or
        holds NaN or infinity.
    """
    folder = find_folder(folder)
    if (folder / CONFIG).is_file():
        return _load_own(folder, model, params)
    if (folder / PEFT_CONFIG).is_file():
        return _load_peft(folder, model, params)
    raise ValueError(f"{folder} holds no adapter: it has neither {CONFIG} nor {PEFT_CONFIG}")


def _load_own(folder: FilePath, model: Model, params: Tree) -> tuple[AdapterSpec, AdapterState]:
    file = folder / CONFIG
    config = read_json_object(file)
    spec = read_spec(config, file)
    digest = check_settings_digest(config, file)
    if digest is None:
        _log.warning(
            "%s has no digests, as those of peft_jax 0.1 have none: damage to it is not noticed;"
            " saved again, the adapter has them",
            file,
        )
    base = f"{config.get('base_model_name_or_path')} ({config.get('model_type')})"
    try:
        targets = spec.targets(params)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {folder} was made for {base} and does not fit this"
            f" {model.family.model_type} model: {error}"
        ) from error
    what = f"the adapter in {folder}, made for {base},"
    stored = _open(folder, _arrays_file(config, spec, model, targets, folder))
    if config["arrays"] == PEFT_ARRAYS:
        _check_peft_tensors(stored, model, spec, params, what=what)
    else:
        arrays = _own_arrays(model, spec, targets, params)
        check_tensors({name: item.shape for item in arrays for name in item.names}, stored, what)
    if digest is not None and digest_arrays(stored) != digest:
        raise ValueError(
            f"{folder / config['arrays']} is damaged or was changed since it was written: its"
            f" arrays do not have the digest {digest}, which {CONFIG} gives. Copy the adapter again"
        )
    warn_of_another_base(folder, config, model, params)
    if config["arrays"] == PEFT_ARRAYS:
        return spec, _read_peft_state(stored, model, spec, params)
    return spec, make_state(read_arrays(arrays, stored))


def _arrays_file(
    config: Mapping[str, Any], spec: AdapterSpec, model: Model, targets: Targets, folder: FilePath
) -> str:
    """The file with the arrays of an adapter of ours.

    Raises:
      ValueError: the configuration names another, or PEFT's no longer says what it said.
    """
    file = folder / CONFIG
    if config["arrays"] == ARRAYS:
        return ARRAYS
    if config["arrays"] != PEFT_ARRAYS:
        raise ValueError(f"{file} says that its arrays are in {config['arrays']!r}, not {ARRAYS}")
    form = peft_form(spec.method)
    if form is None or not form.exact:
        raise ValueError(f"{file} says that its arrays are in {PEFT_ARRAYS}; they cannot be")
    written = write_peft_config(model, spec, targets, form, base_model_name="")
    check_unchanged(read_json_object(folder / PEFT_CONFIG), written, folder / PEFT_CONFIG)
    return PEFT_ARRAYS


def _own_arrays(
    model: Model, spec: AdapterSpec, targets: Targets, params: Tree
) -> list[ArrayTensors]:
    """The tensors of all arrays, in this library's own form."""
    abstract = spec.abstract(params)
    return [*adapted_tensors(model, targets, abstract), *trained_tensors(model, targets, abstract)]


def _load_peft(folder: FilePath, model: Model, params: Tree) -> tuple[AdapterSpec, AdapterState]:
    config = read_json_object(folder / PEFT_CONFIG)
    check_peft_config(config, folder / PEFT_CONFIG)
    what = f"the adapter in {folder}, made for {config.get('base_model_name_or_path')},"
    stored = _open(folder, PEFT_ARRAYS)
    stored = without_base_copies(stored, model, params, what=what)
    spec = spec_of(config, stored, model, params, what=what)
    _check_peft_tensors(stored, model, spec, params, what=what)
    return spec, _read_peft_state(stored, model, spec, params)


def _check_peft_tensors(
    stored: Mapping[str, StoredTensor], model: Model, spec: AdapterSpec, params: Tree, *, what: str
) -> None:
    """Checks that the tensors are just those of the adapter in PEFT's form.

    Raises:
      ValueError: they are not; they are named.
    """
    targets = spec.targets(params)
    trained = peft_trained_tensors(model, targets, spec.abstract(params))
    wanted = {name: item.shape for item in trained for name in item.names}
    flat = flatten(params)
    for path in targets.adapted:
        wanted |= _shapes(model, targets, path, flat[path].shape)
    check_tensors(wanted, stored, what)
    check_tied(model, stored, what=what)


def _read_peft_state(
    stored: Mapping[str, StoredTensor], model: Model, spec: AdapterSpec, params: Tree
) -> AdapterState:
    """The arrays of an adapter in PEFT's form."""
    targets = spec.targets(params)
    arrays = read_arrays(peft_trained_tensors(model, targets, spec.abstract(params)), stored)
    for path in targets.adapted:
        arrays |= _read_adapted(model, targets, path, stored, np.dtype(spec.dtype))
    return make_state(arrays)


def _shapes(
    model: Model, targets: Targets, path: Path, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The tensors, by name, of one adapted kernel [..., d_in, d_out] over its layers."""
    form = peft_form(targets.adapted[path])
    assert form is not None
    return {
        f"{PEFT_PREFIX}{module}.{name}": size
        for module in modules_of(model, path)
        for name, size in form.shapes(*shape[-2:]).items()
    }


def _read_adapted(
    model: Model,
    targets: Targets,
    path: Path,
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
) -> dict[tuple[str, Path], Any]:
    """The arrays over one adapted kernel, by tree and path."""
    form = peft_form(targets.adapted[path])
    assert form is not None
    layers = []
    for module in modules_of(model, path):
        start = f"{PEFT_PREFIX}{module}."
        tensors = {name: read_tensor(stored[start + name]) for name in form.names}
        layers.append(form.restore(tensors))
    return {
        (tree, (*path, name)): stack(path, [layer[index][name] for layer in layers], dtype)
        for index, tree in enumerate(("trainable", "constant"))
        for name in layers[0][index]
    }


def _open(folder: FilePath, name: str) -> dict[str, StoredTensor]:
    """The tensors of one of the folder's files.

    Raises:
      ValueError: it is not there, or there is a pickle in its place.
    """
    if (folder / name).is_file():
        return read_header(folder / name)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has its arrays in {pickled[0]}, a pickle: loading one can run any code, so"
            " it is never done here. Convert it, where you trust it: load it with"
            " peft.PeftModel.from_pretrained and save it with save_pretrained, which writes"
            f" {PEFT_ARRAYS}"
        )
    raise ValueError(f"{folder} lacks {name}, which its configuration speaks of")
