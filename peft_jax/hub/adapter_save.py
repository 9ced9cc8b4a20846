"""Saves adapters for this library and for Hugging Face PEFT, and exports merged models."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterSpec, AdapterState, Targets
from peft_jax.adapters.peft_form import NoPeftFormError, PeftForm, nbytes
from peft_jax.adapters.trainable_tokens import TrainableTokensForm
from peft_jax.adapters.virtual_form import VirtualForm
from peft_jax.core import Path, Tree, flatten, is_stacked, join_path
from peft_jax.hub.adapter_arrays import (
    ArrayTensors,
    adapted_tensors,
    check_state,
    tensors_to_write,
    trained_tensors,
    virtual_tensors,
)
from peft_jax.hub.adapter_base import digest_of_origin
from peft_jax.hub.adapter_digests import digest_arrays
from peft_jax.hub.adapter_files import ARRAYS, CONFIG, PEFT_ARRAYS, PEFT_CONFIG, write_config
from peft_jax.hub.peft_config import (
    HEAD,
    check_scaled_biases,
    check_tied_tables,
    tied_embedding,
    write_peft_config,
)
from peft_jax.hub.peft_experts import check_all_layers, form_of_leaf, wrappers
from peft_jax.hub.peft_names import PEFT_PREFIX, SHARED_PREFIX
from peft_jax.hub.peft_virtual import virtual_tensor
from peft_jax.hub.save import MAX_SHARD_BYTES, save_model
from peft_jax.hub.tensors import TensorToWrite, read_header, write_tensors
from peft_jax.models import Model, TrainableModel
from peft_jax.runtime.files import atomic_folder, write_json

FILES = (CONFIG, ARRAYS, PEFT_CONFIG, PEFT_ARRAYS)

MAX_COPY_BYTES = 4 * 2**30
"""Largest copy for PEFT, whose rotations are dense blocks."""

_METADATA = {"format": "pt"}

_INSTEAD = "write a LoRA near it (peft-jax export --format=lora), or the merged model"


def save_adapter(
    folder: str | FilePath,
    model: TrainableModel,
    spec: AdapterSpec,
    state: AdapterState,
    base_model_name: str,
    *,
    quantization: str | None = None,
) -> None:
    """Saves an adapter; `load_adapter` restores it bit for bit, and PEFT loads it if supported.

    The write is atomic. An adapter in the folder is replaced, other files are kept. For the files
    see [`adapter_files`][peft_jax.hub.adapter_files].

    Args:
      folder: Output folder; it is created.
      model: Base model.
      spec: Adapter specification.
      state: Adapter arrays.
      base_model_name: Path of the base, or its name on the hub, recorded for loading.
      quantization: Format of the base's kernels during training, one of `peft_jax.core.FORMATS`,
        so that the adapter can be used on the same base; None if unknown.

    Raises:
      ValueError: The arrays do not match `spec` for this model, or the folder holds other files
        but no adapter.

    Example:
      >>> import tempfile
      >>> from peft_jax.adapters import LoRA
      >>> from peft_jax.hub import load_adapter
      >>> from peft_jax.models import build_model
      >>> model = build_model({
      ...     "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2,
      ...     "num_attention_heads": 2, "intermediate_size": 16})
      >>> params = model.init_params(jax.random.key(0))
      >>> spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj",))
      >>> state = spec.init(jax.random.key(1), params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(folder, model, spec, state, "someone/base")
      ...     print(*sorted(file.name for file in FilePath(folder).iterdir()))
      ...     loaded_spec, loaded = load_adapter(folder, model, params)
      adapter_config.json adapter_model.safetensors peft_jax_adapter.json
      >>> loaded_spec == spec, jax.tree.map(jnp.array_equal, loaded, state).trainable["layers"]
      (True, {'self_attn': {'q_proj': {'kernel': {'a': Array(True, dtype=bool),
                                                  'b': Array(True, dtype=bool)}}}})
    """
    folder = FilePath(folder)
    check_adapter_folder(folder)
    params = model.abstract_params()
    targets = spec.targets(params)
    model.check_virtual(state.trainable)
    check_state(state, spec.abstract(params))
    form, peft_tensors, settings = None, [], {}
    try:
        if not isinstance(model, Model):
            raise NoPeftFormError(f"PEFT adapts models of transformers, not {model.model_type}")
        form = _check_form(model, spec, targets, params)
        peft_tensors = list(_peft_tensors(model, targets, params, state, form))
        settings = write_peft_config(model, spec, targets, form, base_model_name=base_model_name)
        peft: dict[str, Any] = {"loads": True}
    except NoPeftFormError as error:
        form, peft = None, {"loads": False, "why": str(error)}
    exact = form is not None and form.exact
    arrays_in = PEFT_ARRAYS if exact else ARRAYS

    with atomic_folder(folder) as temporary:
        _keep_other_files(folder, temporary)
        if form is not None:
            write_tensors(temporary / PEFT_ARRAYS, peft_tensors, _METADATA)
            write_json(temporary / PEFT_CONFIG, settings)
        if not exact:
            arrays = [
                *adapted_tensors(model, targets, state),
                *virtual_tensors(state),
                *trained_tensors(model, targets, state),
            ]
            tensors = list(tensors_to_write(arrays, state))
            write_tensors(temporary / ARRAYS, tensors, _METADATA)
        config = write_config(
            spec,
            model_type=model.model_type,
            base_model_name=base_model_name,
            arrays_in=arrays_in,
            arrays_digest=digest_arrays(read_header(temporary / arrays_in)),
            peft=peft,
            quantization=quantization,
            base_digest=digest_of_origin(model),
        )
        write_json(temporary / CONFIG, config)


def export_merged(
    folder: str | FilePath,
    model: Model,
    params: Tree,
    spec: AdapterSpec,
    state: AdapterState,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the merged model as a Hugging Face checkpoint, which transformers and vLLM load.

    All methods are supported. The tokenizer is not written.

    Args:
      folder: Output folder; it is created.
      model: Base model.
      params: Parameters of the base, or those of `spec.frozen`.
      spec: Adapter specification.
      state: Adapter arrays.
      dtype: Dtype of the checkpoint; by default merged kernels have the base's dtype, and fully
        trainable leaves keep the dtype they were trained in.
      max_shard_bytes: Approximate size above which the weights are split into several files.

    Raises:
      ValueError: The merged model holds NaN or infinity; the message names the module.
    """
    merged = spec.merge(params, state)
    if dtype is not None:
        merged = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), merged)
    save_model(folder, model, merged, max_shard_bytes=max_shard_bytes)


def peft_trained_tensors(
    model: Model, targets: Targets, state: AdapterState, form: PeftForm
) -> list[ArrayTensors]:
    """Returns the tensors of the fully trainable leaves, with PEFT's names.

    A trainable embedding that is tied to the head is listed under both names.
    """

    def names(item: ArrayTensors) -> tuple[str, ...]:
        if item.path in targets.biases:
            return _bias_names(model, targets, item)
        if item.path in targets.selected:
            return tuple(map(form.name_in_copy, item.names))
        return item.names

    found = [
        dataclasses.replace(item, names=names(item))
        for item in trained_tensors(model, targets, state, prefix=PEFT_PREFIX)
    ]
    tied = tied_embedding(model, targets)
    return found + [
        dataclasses.replace(item, names=(f"{PEFT_PREFIX}{HEAD}.weight",))
        for item in found
        if item.path == tied
    ]


def _bias_names(model: Model, targets: Targets, item: ArrayTensors) -> tuple[str, ...]:
    """Returns PEFT's names of a bias, which lies in the base's layer where that is adapted."""
    kernel = (*item.path[:-1], "kernel")
    if kernel not in targets.adapted:
        return item.names
    methods = targets.layers(kernel, len(item.names))
    return tuple(
        name if method is None else f"{name.removesuffix('.bias')}.base_layer.bias"
        for name, method in zip(item.names, methods, strict=True)
    )


def _check_form(model: Model, spec: AdapterSpec, targets: Targets, params: Tree) -> PeftForm:
    """Returns the PEFT form of the method's arrays.

    Raises:
      NoPeftFormError: PEFT has no such method, or its form would be too large.
    """
    if spec.method.trains_base:
        raise NoPeftFormError(
            "full fine-tuning changes the base's own tensors and is no adapter to PEFT; export the"
            " merged model instead"
        )
    form = spec.method.peft_form()
    if form is None:
        raise NoPeftFormError(f"PEFT has no method {spec.method.name!r}; {_INSTEAD}")
    if spec.trainable_token_indices and "trainable_token_indices" not in form.understood.read:
        raise NoPeftFormError(
            f"PEFT trains no tokens beside {form.peft_type}; export the merged model"
        )
    if targets.trained and not form.saves_modules:
        raise NoPeftFormError(
            f"PEFT trains no modules beside {form.peft_type}; export the merged model"
        )
    if targets.biases and not form.only_bias:
        raise NoPeftFormError(
            f"PEFT trains no biases with {form.peft_type}, but bias is {spec.bias!r}; export the"
            " merged model"
        )
    check_all_layers(targets)
    if spec.share_experts:
        raise NoPeftFormError(
            "PEFT has an adapter of each expert, and share_experts makes one of all; export the"
            " merged model instead"
        )
    own = {path: method.peft_form() for path, method in targets.adapted.items()}
    forms = {path: form for path, form in own.items() if form is not None}
    _check_same_settings(forms)
    try:
        check_scaled_biases(model, forms, what=f"{spec.method.name} here")
        check_tied_tables(model, targets, what=f"{spec.method.name} here")
    except ValueError as error:
        raise NoPeftFormError(str(error)) from error
    if not form.exact:
        size = 0
        for path, leaf in flatten(params).items():
            if path in targets.adapted:
                layers = leaf.shape[0] if is_stacked(path) else 1
                size += layers * nbytes(form.shapes(*leaf.shape[-2:]))
        if size > MAX_COPY_BYTES:
            raise NoPeftFormError(
                f"its tensors in the form that PEFT needs are {size / 2**30:.1f} GiB; {_INSTEAD}"
            )
    return form


def _check_same_settings(forms: Mapping[Path, PeftForm]) -> None:
    """Raises NoPeftFormError if modules differ in a setting that PEFT has only once."""
    values: dict[str, Any] = {}
    for path, form in forms.items():
        for name, value in form.settings().items():
            if name not in form.patterns and values.setdefault(name, value) != value:
                raise NoPeftFormError(
                    f"{join_path(path[:-1])} has {name} = {value!r}, but another module"
                    f" {values[name]!r}, and PEFT has one value for all; export the merged model"
                    " instead"
                )


def _peft_tensors(
    model: Model, targets: Targets, params: Tree, state: AdapterState, form: PeftForm
) -> Iterator[TensorToWrite]:
    """Yields the adapter's tensors in PEFT's form.

    Raises:
      NoPeftFormError: A module's arrays have no such form.
    """
    if isinstance(form, VirtualForm):
        yield virtual_tensor(form, state)
        return
    flat = flatten(params)
    trees = [
        flatten(tree, is_leaf=lambda path, _: path in targets.adapted)
        for tree in (state.trainable, state.constant)
    ]
    constants = []
    for path in targets.adapted:
        arrays = {
            name: np.asarray(array) for tree in trees for name, array in tree.get(path, {}).items()
        }
        fixed = trees[1].get(path, {})
        constants.append(
            {name: arrays[name][0] if is_stacked(path) else arrays[name] for name in fixed}
        )
        modules = wrappers(model, path, targets.adapted)
        methods = targets.layers(path, len(modules))
        for index, (module, method) in enumerate(zip(modules, methods, strict=True)):
            if method is None:
                continue
            of_kernel = method.peft_form()
            assert of_kernel is not None
            swapped = model.family.naming.experts_swapped
            own = form_of_leaf(of_kernel, path, flat[path].shape, swapped=swapped)
            one = {name: array[index] for name, array in arrays.items()}
            try:
                tensors = own.export(one if is_stacked(path) else arrays)
            except NoPeftFormError as error:
                raise NoPeftFormError(f"{module}: {error}") from error
            for name, tensor in tensors.items():
                # PEFT's head has a copy of trained tokens, if it is tied to the embedding.
                copied = name in TrainableTokensForm.names and model.config.tie_word_embeddings
                for place in (module, HEAD) if copied else (module,):
                    yield TensorToWrite(
                        name=f"{PEFT_PREFIX}{place}.{name}",
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        fetch=_constant(tensor),
                    )
    shapes = [flat[path].shape[-2:] for path in targets.adapted]
    for name, tensor in form.shared(shapes, constants).items():
        yield TensorToWrite(
            name=f"{SHARED_PREFIX}{name}",
            dtype=tensor.dtype,
            shape=tensor.shape,
            fetch=_constant(tensor),
        )
    yield from tensors_to_write(peft_trained_tensors(model, targets, state, form), state)


def _constant(tensor: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: tensor


def check_adapter_folder(folder: FilePath) -> None:
    """Raises ValueError if an adapter cannot be saved to a folder.

    Raises:
      ValueError: It holds other files but no adapter, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if not folder.exists() or any((folder / name).is_file() for name in (CONFIG, PEFT_CONFIG)):
        return
    if others := sorted(file.name for file in folder.iterdir()):
        raise ValueError(
            f"{folder} holds {others[0]} but no adapter, and would be overwritten; give an empty or"
            " new folder"
        )


def _keep_other_files(folder: FilePath, temporary: FilePath) -> None:
    """Copies the folder's other files, such as a tokenizer or a model card."""

    def own_files(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if FilePath(parent) == folder and name in FILES]

    if folder.exists():
        shutil.copytree(folder, temporary, ignore=own_files, dirs_exist_ok=True, symlinks=True)
