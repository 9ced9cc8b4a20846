"""Reads an adapter specification from the tensors and settings of a Hugging Face PEFT adapter.

PEFT selects single modules by patterns. Here layers are stacked. The adapted modules and layers are
read from the tensors' names, so that patterns mean what they do in PEFT.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from peft_jax.adapters import AdapterSpec
from peft_jax.adapters.embedding_methods import form_of_embedding
from peft_jax.adapters.names import layer_name, matches_name
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.adapters.trainable_tokens import TokensBesideForm
from peft_jax.core import (
    EMBEDDING,
    KERNEL,
    Path,
    Tree,
    flatten,
    is_experts,
    is_stacked,
    join_path,
)
from peft_jax.core.patterns import compile_pattern
from peft_jax.hub.adapter_arrays import listing, modules_of, read_tensor
from peft_jax.hub.peft_config import HEAD
from peft_jax.hub.peft_experts import adapted_experts, parameter_name, wrappers
from peft_jax.hub.peft_names import PEFT_PREFIX
from peft_jax.hub.tensors import INTEGERS, StoredTensor
from peft_jax.models import Model

_HEAD_TENSOR = f"{PEFT_PREFIX}{HEAD}.weight"


@dataclasses.dataclass
class _Found:
    """Stored tensors, grouped by module.

    Attributes:
      adapted: Tensors by the kernel's path, the module's name and the suffix of their own name.
      trained: Number of tensors of each fully trainable leaf.
      selected: Those of `trained` that the method itself trains.
    """

    adapted: dict[Path, dict[str, dict[str, StoredTensor]]]
    trained: dict[Path, int]
    selected: set[Path]


def read_peft_spec(
    config: Mapping[str, Any],
    form: type[PeftForm],
    stored: Mapping[str, StoredTensor],
    model: Model,
    params: Tree,
    *,
    what: str,
) -> AdapterSpec:
    """Reads the adapter specification of a PEFT adapter.

    Args:
      config: Content of `adapter_config.json`, checked by `check_peft_config`.
      form: Form of the tensors, as `check_peft_config` returns it.
      stored: Tensors by name.
      model: Base model.
      params: Parameters of the base, as arrays or shapes.
      what: Name of the adapter in messages.

    Raises:
      ValueError: Tensors do not fit the model, or a module is trained in full in some layers only.
    """
    _check_numbers(config, model, what)
    found = _group_tensors(stored, model, form, config, what)
    check_tied(model, stored, what=what)
    kernels = [path for path in flatten(params) if path[-1] in (KERNEL, EMBEDDING)]
    biases = _biases(found) if _bias(config) != "none" else set()
    common: dict[str, Any] = {
        **_targets(found, model, kernels, flatten(params)),
        "modules_to_save": _short_names(
            found.trained.keys() - biases - found.selected, flatten(params)
        ),
        "trainable_token_indices": _tokens(config),
        "bias": _bias(config) if biases else "none",
        "dtype": _dtype(stored),
    }
    shapes = {
        join_path(path[:-1]): {
            end: tensor.shape for end, tensor in next(iter(own.values())).items()
        }
        for path, own in found.adapted.items()
    }
    try:
        common |= _patterns(config, form, found, model, kernels, what)
        return AdapterSpec(method=form.read(config, shapes), **common)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if what in str(error) else f"{what} {error}") from error


def check_tied(model: Model, stored: Mapping[str, StoredTensor], *, what: str) -> None:
    """Raises ValueError if a tied embedding and head have different trained values."""
    if not model.config.tie_word_embeddings:
        return
    names = model.hf_names()
    (embedding,) = (names[path].name() for path in names if path[-1] == "embedding")
    both = [stored.get(name) for name in (PEFT_PREFIX + embedding, _HEAD_TENSOR)]
    if both == [None, None]:
        return
    one, other = both
    if one is None or other is None or not np.array_equal(read_tensor(one), read_tensor(other)):
        raise ValueError(
            f"{what} has different values for {HEAD} and the embedding, but config.json sets"
            " tie_word_embeddings to true; merge the adapter in PEFT and save the whole model with"
            " tie_word_embeddings set to false"
        )


def _group_tensors(
    stored: Mapping[str, StoredTensor],
    model: Model,
    form: type[PeftForm],
    config: Mapping[str, Any],
    what: str,
) -> _Found:
    """Groups stored tensors by module.

    Raises:
      ValueError: A tensor matches no module of the model, or a module or layer lacks a tensor.
    """
    table = form_of_embedding(form)
    ends = {
        KERNEL: () if form.of_embeddings else form.names,
        EMBEDDING: table.names if table else (),
    }
    every = [end for own in ends.values() for end in own]
    experts = adapted_experts(config, stored, model.hf_names())
    modules: dict[str, tuple[Path, str]] = {}
    leaves: dict[str, Path] = {}
    selected: dict[str, Path] = {}
    for path, hf_name in model.hf_names().items():
        for layer, module in zip(_numbers(model, path), modules_of(model, path), strict=True):
            name = PEFT_PREFIX + hf_name.name(layer)
            leaves[name] = path
            if form.copies:
                selected[form.name_in_copy(name)] = path
            if path[-1] == "bias":
                leaves[f"{PEFT_PREFIX}{module}.base_layer.bias"] = path
        if path[-1] in ends and (path in experts or not is_experts(path)):
            names = zip(wrappers(model, path, experts), modules_of(model, path), strict=True)
            modules |= {PEFT_PREFIX + wrapper: (path, module) for wrapper, module in names}
    # These are read by the tokens of the configuration.
    beside = {
        f"{module}.{end}"
        for module, (path, _) in modules.items()
        for end in TokensBesideForm.names
        if path[-1] == EMBEDDING
    }
    found = _Found({}, {}, set())
    unknown = []
    for name, tensor in stored.items():
        end = next((end for end in every if name.endswith(f".{end}")), "")
        of = modules.get(name.removesuffix(f".{end}")) if end else None
        if of and end in ends[of[0][-1]]:
            found.adapted.setdefault(of[0], {}).setdefault(of[1], {})[end] = tensor
        elif name in selected:
            found.selected.add(selected[name])
            found.trained[selected[name]] = found.trained.get(selected[name], 0) + 1
        elif name in leaves:
            found.trained[leaves[name]] = found.trained.get(leaves[name], 0) + 1
        elif name not in beside and not (name == _HEAD_TENSOR and model.config.tie_word_embeddings):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{what} does not fit this {model.family.model_type} model: it has {listing(unknown)},"
            " which match no module"
        )
    if not found.adapted and not found.selected:
        raise ValueError(f"{what} has no tensors of an adapted module")
    _check_complete(found, model, ends, what)
    return found


def _dtype(stored: Mapping[str, StoredTensor]) -> Literal["float32", "bfloat16"]:
    """Returns the dtype of an adapter's arrays, without regard to integers."""
    found = {tensor.dtype for tensor in stored.values()} - INTEGERS.keys()
    return "bfloat16" if found == {"BF16"} else "float32"


def _numbers(model: Model, path: Path) -> Sequence[int]:
    """Returns the layer of each of a leaf's modules; 0 of one outside the layers."""
    return model.layers_of(path) if is_stacked(path) else (0,)


def _tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that are trained beside adapters, which PEFT may list by module."""
    given = config.get("trainable_token_indices") or ()
    return tuple(next(iter(given.values())) if isinstance(given, Mapping) else given)


def _bias(config: Mapping[str, Any]) -> str:
    """Returns which biases an adapter trains, by this library's name."""
    value = config.get("bias") or "none"
    return value if value in ("none", "all") else "adapted"


def _biases(found: _Found) -> set[Path]:
    """Returns the trained biases of modules that are not trained as a whole."""
    whole = {path[:-1] for path in found.trained if path[-1] != "bias"}
    return {path for path in found.trained if path[-1] == "bias" and path[:-1] not in whole}


def _check_complete(
    found: _Found, model: Model, ends: Mapping[str, tuple[str, ...]], what: str
) -> None:
    for path, own in found.adapted.items():
        missing = [
            f"{module}.{end}"
            for module, tensors in own.items()
            for end in ends[path[-1]]
            if end not in tensors
        ]
        if missing:
            raise ValueError(f"{what} lacks {listing(missing)}")
    for path, count in found.trained.items():
        _check_layers(path, count, model, what)


def _check_layers(path: Path, count: int, model: Model, what: str) -> None:
    layers = len(model.hf_names()[path].rows(model.config.num_layers))
    if count != layers:
        raise ValueError(
            f"{what} trains {join_path(path[:-1])} in full in {count} of {layers} layers, but must"
            " train all of them, because layers are stacked"
        )


def _check_numbers(config: Mapping[str, Any], model: Model, what: str) -> None:
    """Rejects numbers of layers that the model does not have."""
    layers = config.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if beyond := [number for number in numbers if number >= model.config.num_layers]:
        raise ValueError(
            f"{what} sets layers_to_transform = {layers!r}, but the model's layers are 0 to"
            f" {model.config.num_layers - 1}, without {beyond[0]}"
        )


def _targets(
    found: _Found, model: Model, kernels: list[Path], everything: Iterable[Path]
) -> dict[str, tuple[Any, ...]]:
    """Returns `target_modules`, and `layers_to_transform` if all modules have the same layers."""
    if found.selected:
        return {"target_modules": _short_names(found.selected, everything)}
    layers = {
        path: tuple(
            layer
            for layer, module in zip(_numbers(model, path), modules_of(model, path), strict=True)
            if module in own
        )
        for path, own in found.adapted.items()
    }
    some = {path for path, own in layers.items() if len(own) < len(modules_of(model, path))}
    if some and all(map(is_stacked, layers)) and len(set(layers.values())) == 1:
        return {
            "target_modules": _short_names(found.adapted, kernels),
            "layers_to_transform": next(iter(layers.values())),
        }
    whole = _short_names([path for path in layers if path not in some], kernels)
    single = [
        layer_name(join_path(path[:-1]), layer) for path in sorted(some) for layer in layers[path]
    ]
    return {"target_modules": (*whole, *single)}


def _short_names(chosen: Iterable[Path], everything: Iterable[Path]) -> tuple[str, ...]:
    """Returns the shortest suffix of each chosen module's name that matches no other module."""
    wanted = {join_path(path[:-1]) for path in chosen}
    others = {join_path(path[:-1]) for path in everything} - wanted
    names = set()
    for module in wanted:
        parts = module.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names.add(
            next(end for end in ends if not any(matches_name(end, other) for other in others))
        )
    return tuple(sorted(names))


def _patterns(
    config: Mapping[str, Any],
    form: type[PeftForm],
    found: _Found,
    model: Model,
    kernels: list[Path],
    what: str,
) -> dict[str, dict[str, Any]]:
    """Returns the form's patterns (`rank_pattern`, …), by module names of this library."""
    patterns: dict[str, dict[str, Any]] = {}
    for common, setting in form.patterns.items():
        kind = form.understood.read[common]
        theirs = config.get(setting) or {}
        patterns[setting] = {}
        for path, modules in found.adapted.items():
            values = {
                layer_name(join_path(path[:-1]), layer): _match_pattern(
                    theirs, parameter_name(path, module)
                )
                for layer, module in zip(
                    _numbers(model, path), modules_of(model, path), strict=True
                )
                if module in modules
            }
            if len(set(values.values())) == 1:
                values = {_short_names([path], kernels)[0]: next(iter(values.values()))}
            patterns[setting] |= {
                name: kind(value)
                for name, value in values.items()
                if value is not None and value != config.get(common)
            }
    return patterns


def _match_pattern(patterns: Mapping[str, Any], module: str) -> Any:
    """Returns the value of the first pattern that matches by PEFT's rule, or None."""
    for key, value in patterns.items():
        compile_pattern(key)  # Checked alone, so that an error shows the pattern as given.
        if compile_pattern(rf"(.*\.)?({key})").fullmatch(module):
            return value
    return None
