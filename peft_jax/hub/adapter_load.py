"""Loading an adapter that this library, or Hugging Face PEFT, has written."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from peft_jax.adapters import AdapterSpec, AdapterState, Full, Plan
from peft_jax.core import Path, Tree, flatten
from peft_jax.hub.adapter_arrays import (
    adapted_tensors,
    check_tensors,
    make_state,
    modules_of,
    read_arrays,
    read_tensor,
    stack,
    trained_tensors,
)
from peft_jax.hub.adapter_files import ARRAYS, CONFIG, PEFT_ARRAYS, PEFT_CONFIG, read_spec
from peft_jax.hub.adapter_save import peft_trained_tensors
from peft_jax.hub.checkpoint import PICKLED
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.files import read_json_object
from peft_jax.hub.peft_config import check_peft_config, check_unchanged, write_peft_config
from peft_jax.hub.peft_forms import peft_form
from peft_jax.hub.peft_import import check_tied, spec_of
from peft_jax.hub.peft_names import PEFT_PREFIX
from peft_jax.hub.tensors import StoredTensor, read_header
from peft_jax.models import Model


def load_adapter(
    folder: str | FilePath, model: Model, params: Tree
) -> tuple[AdapterSpec, AdapterState]:
    """An adapter from a folder, or from the Hugging Face hub.

    What `save_adapter` wrote comes back bit for bit. Of Hugging Face PEFT's own adapters LoRA
    (plain, rank-stabilised, with patterns and modules_to_save) and BOFT are read; a setting that
    changes what is computed and is not implemented is refused by name. Nothing is ever unpickled.

    Args:
      folder: where it is, or its name on the hub.
      model: the base it was made for.
      params: the base's parameters, arrays or abstract ones.

    Returns:
      What is adapted, and the adapter's arrays: `spec.bind(params, state)` is the adapted model.

    Raises:
      ValueError: the folder holds no adapter, or not one of this base: the modules or tensors that
        are missing, left over or of another shape are named.
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
    base = f"{config.get('base_model_name_or_path')} ({config.get('model_type')})"
    try:
        plan = spec.plan(params)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {folder} was made for {base} and does not fit this"
            f" {model.family.model_type} model: {error}"
        ) from error
    what = f"the adapter in {folder}, made for {base},"
    if config["arrays"] == PEFT_ARRAYS:
        form = None if isinstance(spec.method, Full) else peft_form(spec.method)
        if form is None or not form.exact:
            raise ValueError(f"{file} says that its arrays are in {PEFT_ARRAYS}; they cannot be")
        written = write_peft_config(model, spec, plan, form, base_model_name="")
        check_unchanged(read_json_object(folder / PEFT_CONFIG), written, folder / PEFT_CONFIG)
        return spec, _read_peft_state(folder, model, spec, params, what=what)
    if config["arrays"] != ARRAYS:
        raise ValueError(f"{file} says that its arrays are in {config['arrays']!r}, not {ARRAYS}")
    abstract = spec.abstract(params)
    arrays = [*adapted_tensors(model, plan, abstract), *trained_tensors(model, plan, abstract)]
    stored = _open(folder, ARRAYS)
    check_tensors({name: item.shape for item in arrays for name in item.names}, stored, what)
    return spec, make_state(read_arrays(arrays, stored))


def _load_peft(folder: FilePath, model: Model, params: Tree) -> tuple[AdapterSpec, AdapterState]:
    config = read_json_object(folder / PEFT_CONFIG)
    check_peft_config(config, folder / PEFT_CONFIG)
    what = f"the adapter in {folder}, made for {config.get('base_model_name_or_path')},"
    stored = _open(folder, PEFT_ARRAYS)
    spec = spec_of(config, stored, model, params, what=what)
    return spec, _read_peft_state(folder, model, spec, params, what=what)


def _read_peft_state(
    folder: FilePath, model: Model, spec: AdapterSpec, params: Tree, *, what: str
) -> AdapterState:
    """The arrays of an adapter in PEFT's form."""
    plan = spec.plan(params)
    abstract = spec.abstract(params)
    stored = _open(folder, PEFT_ARRAYS)
    trained = peft_trained_tensors(model, plan, abstract)
    wanted = {name: item.shape for item in trained for name in item.names}
    flat = flatten(params)
    for path in plan.adapted:
        wanted |= _shapes(model, plan, path, flat[path].shape)
    check_tensors(wanted, stored, what)
    check_tied(model, stored, what=what)
    arrays = read_arrays(trained, stored)
    for path in plan.adapted:
        arrays |= _read_adapted(model, plan, path, stored, np.dtype(spec.dtype))
    return make_state(arrays)


def _shapes(
    model: Model, plan: Plan, path: Path, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The tensors, by name, of one adapted kernel [..., d_in, d_out] over its layers."""
    form = peft_form(plan.adapted[path])
    assert form is not None
    return {
        f"{PEFT_PREFIX}{module}.{name}": size
        for module in modules_of(model, path)
        for name, size in form.shapes(*shape[-2:]).items()
    }


def _read_adapted(
    model: Model,
    plan: Plan,
    path: Path,
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
) -> dict[tuple[str, Path], Any]:
    """The arrays over one adapted kernel, by tree and path."""
    form = peft_form(plan.adapted[path])
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
