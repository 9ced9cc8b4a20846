"""Loads adapters saved by this library or by Hugging Face PEFT."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

import numpy as np

from peft_jax.adapters import AdapterMethod, AdapterSpec, AdapterState, Targets, TrainingMethod
from peft_jax.adapters.peft_form import NoPeftFormError, PeftForm
from peft_jax.adapters.spec import kernel_constants
from peft_jax.adapters.virtual_form import VirtualForm
from peft_jax.core import Path, Tree, flatten, is_experts, is_stacked, join_path
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
    virtual_tensors,
)
from peft_jax.hub.adapter_base import warn_on_base_mismatch
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
from peft_jax.hub.peft_config import (
    check_peft_config,
    check_scaled_biases,
    check_tied_tables,
    check_unchanged,
    write_peft_config,
)
from peft_jax.hub.peft_copies import base_kernel, drop_base_copies, drop_tied_tokens
from peft_jax.hub.peft_experts import form_of_leaf, wrappers
from peft_jax.hub.peft_import import check_tied, read_peft_spec
from peft_jax.hub.peft_names import PEFT_PREFIX, SHARED_PREFIX
from peft_jax.hub.peft_virtual import (
    check_virtual_tensor,
    read_virtual_spec,
    read_virtual_state,
)
from peft_jax.hub.tensors import StoredTensor, read_header
from peft_jax.models import Model, TrainableModel
from peft_jax.runtime.files import read_json_object

LayerForms = Mapping[Path, tuple[PeftForm | None, ...]]
"""PEFT forms of each layer's tensors, or None for layers without, by the kernels' paths."""

_log = logging.getLogger(__name__)


def load_adapter(
    folder: str | FilePath, model: TrainableModel, params: Tree
) -> tuple[AdapterSpec, AdapterState]:
    """Loads an adapter from a folder or from the Hugging Face hub.

    Adapters written by `save_adapter` are restored bit for bit, and digests detect arrays or
    settings that were changed. A base of another family or with other weights is logged as a
    warning. Of Hugging Face PEFT's adapters, those of the methods with a `PeftForm` are
    supported; a setting that would change the computation and is not implemented raises ValueError.
    Nothing is ever unpickled.

    Args:
      folder: Folder of the adapter, or its name on the hub.
      model: Base model.
      params: Parameters of the base, as arrays or shapes.

    Returns:
      The adapter specification and the adapter arrays; `spec.bind(params, state)` binds them.

    Raises:
      ValueError: The folder holds no adapter, or one that does not fit the base (the message names
        missing, unexpected and wrongly shaped tensors), is damaged or changed, or holds NaN or
        infinity.
    """
    folder = find_folder(folder)
    if (folder / CONFIG).is_file():
        return _load_own(folder, model, params)
    if (folder / PEFT_CONFIG).is_file():
        return _load_peft(folder, _check_names(model, folder), params)
    raise ValueError(f"{folder} holds no adapter: it has neither {CONFIG} nor {PEFT_CONFIG}")


def _check_names(model: TrainableModel, folder: FilePath) -> Model:
    """Returns the model if it has the names of modules that files of PEFT have."""
    if not isinstance(model, Model):
        raise ValueError(
            f"the adapter in {folder} is in Hugging Face PEFT's format, which names the modules of"
            f" a model of transformers, but this model is {model.model_type}"
        )
    return model


def _load_own(
    folder: FilePath, model: TrainableModel, params: Tree
) -> tuple[AdapterSpec, AdapterState]:
    file = folder / CONFIG
    config = read_json_object(file)
    spec = read_spec(config, file)
    digest = check_settings_digest(config, file)
    if digest is None:
        _log.warning(
            "%s has no digests (it was written by peft_jax 0.1), so damage is not detected; save"
            " the adapter again to add them",
            file,
        )
    base = f"{config.get('base_model_name_or_path')} ({config.get('model_type')})"
    try:
        targets = spec.targets(params)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {folder} was trained on {base} and does not fit this"
            f" {model.model_type} model: {error}"
        ) from error
    what = f"the adapter in {folder}, trained on {base},"
    stored = _open(folder, _arrays_file(config, spec, model, targets, folder))
    model.check_virtual(spec.abstract(params).trainable)
    form = spec.method.peft_form()
    in_peft_form = config["arrays"] == PEFT_ARRAYS
    if in_peft_form and isinstance(form, VirtualForm):
        check_virtual_tensor(stored, form, params, what=what)
    elif in_peft_form:
        named = _check_names(model, folder)
        forms = _layer_forms(named, targets, params, _own_form)
        tensors = drop_tied_tokens(stored, named, what=what)
        _check_peft_tensors(tensors, named, spec, params, forms, what=what)
    else:
        arrays = _own_arrays(model, spec, targets, params)
        check_tensors({name: item.shape for item in arrays for name in item.names}, stored, what)
    if digest is not None and digest_arrays(stored) != digest:
        raise ValueError(
            f"{folder / config['arrays']} is damaged or was changed since it was written: the"
            f" digest of its arrays is not {digest}, as in {CONFIG}; copy the adapter again"
        )
    warn_on_base_mismatch(folder, config, model, params)
    if in_peft_form and isinstance(form, VirtualForm):
        return spec, read_virtual_state(stored, form, spec, params)
    if in_peft_form:
        return spec, _read_peft_state(stored, named, spec, params, forms)
    return spec, make_state(read_arrays(arrays, stored))


def _arrays_file(
    config: Mapping[str, Any],
    spec: AdapterSpec,
    model: TrainableModel,
    targets: Targets,
    folder: FilePath,
) -> str:
    """Returns the name of the file with the arrays of this library's adapter.

    Raises:
      ValueError: The configuration names another file, or PEFT's configuration was changed.
    """
    file = folder / CONFIG
    if config["arrays"] == ARRAYS:
        return ARRAYS
    if config["arrays"] != PEFT_ARRAYS:
        raise ValueError(
            f"{file} sets arrays = {config['arrays']!r}; it must be {ARRAYS!r} or {PEFT_ARRAYS!r}"
        )
    named = _check_names(model, folder)
    form = spec.method.peft_form()
    if form is None or not form.exact:
        raise ValueError(
            f"{file} sets arrays = {PEFT_ARRAYS!r}; for {spec.method.name!r} it must be {ARRAYS!r}"
        )
    written = write_peft_config(named, spec, targets, form, base_model_name="")
    check_unchanged(read_json_object(folder / PEFT_CONFIG), written, folder / PEFT_CONFIG)
    return PEFT_ARRAYS


def _own_arrays(
    model: TrainableModel, spec: AdapterSpec, targets: Targets, params: Tree
) -> list[ArrayTensors]:
    """Returns the tensors of all arrays, in this library's format."""
    abstract = spec.abstract(params)
    return [
        *adapted_tensors(model, targets, abstract),
        *virtual_tensors(abstract),
        *trained_tensors(model, targets, abstract),
    ]


def _load_peft(folder: FilePath, model: Model, params: Tree) -> tuple[AdapterSpec, AdapterState]:
    config = read_json_object(folder / PEFT_CONFIG)
    form = check_peft_config(config, folder / PEFT_CONFIG)
    what = f"the adapter in {folder}, trained on {config.get('base_model_name_or_path')},"
    stored = _open(folder, PEFT_ARRAYS)
    if issubclass(form, VirtualForm):
        spec = read_virtual_spec(config, form, stored, what=what)
        model.check_virtual(spec.abstract(params).trainable)
        own = form(spec.method)
        check_virtual_tensor(stored, own, params, what=what)
        return spec, read_virtual_state(stored, own, spec, params)
    stored, shared = _split_shared(stored, form, what=what)
    stored = drop_base_copies(stored, model, params, what=what)
    stored = drop_tied_tokens(stored, model, what=what)
    spec = read_peft_spec(config, form, stored, model, params, what=what)
    targets = spec.targets(params)

    def make(method: AdapterMethod) -> PeftForm:
        return _own_form(method) if method.maps_tokens else form(method)

    check_scaled_biases(
        model, {path: make(method) for path, method in targets.adapted.items()}, what=what
    )
    check_tied_tables(model, targets, what=what)
    try:
        forms = _layer_forms(model, targets, params, make)
    except NoPeftFormError as error:
        raise ValueError(f"{what} cannot be loaded: {error}") from error
    _check_peft_tensors(stored, model, spec, params, forms, what=what)
    try:
        return spec, _read_peft_state(stored, model, spec, params, forms, shared)
    except NoPeftFormError as error:
        raise ValueError(f"{what} cannot be loaded: {error}") from error


def _split_shared(
    stored: Mapping[str, StoredTensor], form: type[PeftForm], *, what: str
) -> tuple[dict[str, StoredTensor], dict[str, np.ndarray]]:
    """Returns the tensors of modules, and those that all modules share, by short name.

    Raises:
      ValueError: A shared tensor is missing.
    """
    names = {SHARED_PREFIX + name: name for name in form.shared_names}
    if missing := [name for name in names if name not in stored]:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    # PEFT also writes them for each of the modules that share them.
    own = {
        name: tensor
        for name, tensor in stored.items()
        if name.rpartition(".")[2] not in form.shared_names
    }
    return own, {short: read_tensor(stored[name]) for name, short in names.items()}


def _layer_forms(
    model: Model, targets: Targets, params: Tree, make: Callable[[AdapterMethod], PeftForm]
) -> LayerForms:
    """Returns the forms of each layer's tensors, or None where a layer is not adapted."""
    flat, swapped = flatten(params), model.family.naming.experts_swapped
    return {
        path: tuple(
            None
            if method is None
            else form_of_leaf(make(method), path, flat[path].shape, swapped=swapped)
            for method in targets.layers(path, len(modules_of(model, path)))
        )
        for path in targets.adapted
    }


def _own_form(method: TrainingMethod) -> PeftForm:
    """Returns the PEFT form that `save_adapter` writes."""
    form = method.peft_form()
    assert form is not None
    return form


def _check_peft_tensors(
    stored: Mapping[str, StoredTensor],
    model: Model,
    spec: AdapterSpec,
    params: Tree,
    forms: LayerForms,
    *,
    what: str,
) -> None:
    """Raises ValueError unless the tensors are exactly those of the adapter in PEFT's form.

    Raises:
      ValueError: Tensors are missing, unexpected or wrongly shaped; the message names them.
    """
    targets = spec.targets(params)
    trained = peft_trained_tensors(model, targets, spec.abstract(params), _own_form(spec.method))
    wanted = {name: item.shape for item in trained for name in item.names}
    flat = flatten(params)
    for path, own in forms.items():
        wanted |= _shapes(wrappers(model, path, forms), own, flat[path].shape, stored)
    check_tensors(wanted, stored, what)
    check_tied(model, stored, what=what)


def _read_peft_state(
    stored: Mapping[str, StoredTensor],
    model: Model,
    spec: AdapterSpec,
    params: Tree,
    forms: LayerForms,
    shared: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> AdapterState:
    """Reads the arrays of an adapter in PEFT's form, some of which are shared."""
    targets, flat = spec.targets(params), flatten(params)
    trained = peft_trained_tensors(model, targets, spec.abstract(params), _own_form(spec.method))
    arrays = read_arrays(trained, stored)
    dtype = np.dtype(spec.dtype)
    for path, own in forms.items():
        method = targets.adapted[path]
        modules = wrappers(model, path, forms)
        arrays |= _read_adapted(modules, path, own, method, flat[path].shape, stored, shared, dtype)
        constants = {("constant", (*path, name)) for name in method.axes(None, None)[1]}
        if constants - arrays.keys():
            if is_experts(path):
                raise ValueError(
                    f"the start of the adapter of {join_path(path[:-1])} is computed from the"
                    " base's kernels, which is not implemented for experts; convert the adapter in"
                    " PEFT with path_initial_model_for_weight_conversion"
                )
            kernel = base_kernel(model, path, flat[path])
            for name, array in kernel_constants(method, kernel, is_stacked(path)).items():
                arrays["constant", (*path, name)] = array.astype(dtype)
    return make_state(arrays)


def _shapes(
    modules: Sequence[str],
    forms: Sequence[PeftForm | None],
    shape: tuple[int, ...],
    stored: Mapping[str, StoredTensor],
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, by name, of the tensors of one adapted kernel [..., d_in, d_out]."""
    wanted = {}
    d_in, d_out = shape[-2:]
    for module, form in zip(modules, forms, strict=True):
        if form is None:
            continue
        start = f"{PEFT_PREFIX}{module}."
        found = {name: stored[start + name].shape for name in form.names if start + name in stored}
        for name, size in form.accepted_shapes(d_in, d_out, found).items():
            wanted[start + name] = size
    return wanted


def _read_adapted(
    modules: Sequence[str],
    path: Path,
    forms: Sequence[PeftForm | None],
    method: AdapterMethod,
    shape: tuple[int, ...],
    stored: Mapping[str, StoredTensor],
    shared: Mapping[str, np.ndarray],
    dtype: np.dtype,
) -> dict[tuple[str, Path], Any]:
    """Reads the arrays of one adapted kernel [..., d_in, d_out], by tree and path.

    Arrays of layers that are not adapted are neutral, and those of smaller rank end with zeros.
    """
    d_in, d_out = shape[-2:]
    neutral = [flatten(tree) for tree in method.neutral((d_in, d_out))] if None in forms else []
    layers = []
    for module, form in zip(modules, forms, strict=True):
        if form is None:
            layers.append(
                [{name[0]: np.asarray(x) for name, x in tree.items()} for tree in neutral]
            )
            continue
        start = f"{PEFT_PREFIX}{module}."
        names = form.shapes(d_in, d_out)
        tensors = {
            name: read_tensor(stored[start + name], integers=name in form.integers)
            for name in names
        }
        try:
            form.check(tensors, d_in, d_out)
        except ValueError as error:
            raise ValueError(f"the adapter of {module} has {error}") from error
        trainable, constant = form.restore(tensors)
        layers.append([trainable, constant | form.constants(shared, d_in, d_out)])
    arrays = {
        (tree, (*path, name)): _pad([one[index][name] for one in layers])
        for index, tree in enumerate(("trainable", "constant"))
        for name in layers[0][index]
    }
    return {
        key: stack(path, own, own[0].dtype if own[0].dtype.kind == "i" else dtype)
        for key, own in arrays.items()
    }


def _pad(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Pads arrays with zeros at the end of each axis to the largest of their shapes."""
    shape = np.max([array.shape for array in arrays], axis=0)
    return [
        np.pad(array, [(0, most - size) for most, size in zip(shape, array.shape, strict=True)])
        for array in arrays
    ]


def _open(folder: FilePath, name: str) -> dict[str, StoredTensor]:
    """Opens one of the folder's safetensors files.

    Raises:
      ValueError: The file is missing, or a pickle replaces it.
    """
    if (folder / name).is_file():
        return read_header(folder / name)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has its arrays in {pickled[0]}, a pickle, which is never loaded because it"
            " can run any code. If you trust it, load it with peft.PeftModel.from_pretrained and"
            f" save it with save_pretrained, which writes {PEFT_ARRAYS}"
        )
    raise ValueError(f"{folder} lacks {name}, which its configuration names")
