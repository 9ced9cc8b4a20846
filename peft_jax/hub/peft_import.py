"""What a Hugging Face PEFT adapter adapts, read from its tensors' names and its settings.

PEFT adapts modules one by one, chosen by patterns; here layers are stacked, and an adapter covers
all of them. So which modules are adapted is taken from the tensors themselves, and what cannot be
stacked is refused.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import BOFT, AdapterSpec, LoRA
from peft_jax.adapters.names import matches_name
from peft_jax.core import Path, Tree, flatten, is_stacked, join_path
from peft_jax.core.patterns import compile_pattern
from peft_jax.hub.adapter_arrays import listing, modules_of, read_tensor
from peft_jax.hub.load import open_sources
from peft_jax.hub.peft_config import HEAD
from peft_jax.hub.peft_forms import BOFT_NAMES, LORA_NAMES
from peft_jax.hub.peft_names import PEFT_PREFIX
from peft_jax.hub.tensors import StoredTensor
from peft_jax.models import Model

_NAMES = {"LORA": LORA_NAMES, "BOFT": BOFT_NAMES}
_HEAD_TENSOR = f"{PEFT_PREFIX}{HEAD}.weight"


@dataclasses.dataclass
class _Found:
    """What an adapter's tensors are of.

    Attributes:
      adapted: the tensors by kernel, by the module's name and by the end of their own.
      trained: the leaves trained themselves, and how many tensors there are of each.
    """

    adapted: dict[Path, dict[str, dict[str, StoredTensor]]]
    trained: dict[Path, int]


def spec_of(
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    model: Model,
    params: Tree,
    *,
    what: str,
) -> AdapterSpec:
    """What a PEFT adapter adapts, and how.

    Args:
      config: the content of `adapter_config.json`, checked.
      stored: the tensors.
      model: the base.
      params: its parameters, arrays or abstract ones.
      what: what the adapter is called in messages.

    Raises:
      ValueError: tensors are not of this model, or differ between layers that are stacked here.
    """
    found = _sort(stored, model, _NAMES[config["peft_type"]], what)
    check_tied(model, stored, what=what)
    kernels = [path for path in flatten(params) if path[-1] == "kernel"]
    common: dict[str, Any] = {
        "target_modules": _short(found.adapted, kernels),
        "modules_to_save": _short(found.trained, flatten(params)),
        "dtype": "bfloat16" if all(t.dtype == "BF16" for t in stored.values()) else "float32",
    }
    try:
        if config["peft_type"] == "BOFT":
            return AdapterSpec(method=_boft(config, found, what), **common)
        common |= _patterns(config, found, model, kernels, what)
        return AdapterSpec(method=_lora(config), **common)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if what in str(error) else f"{what} {error}") from error


def without_base_copies(
    stored: Mapping[str, StoredTensor], model: Model, params: Tree, *, what: str
) -> dict[str, StoredTensor]:
    """The tensors without the copies of the base that PEFT saves beside an adapted head.

    Args:
      stored: the tensors of an adapter of PEFT's.
      model: the base.
      params: its parameters; in place of abstract ones the base's files are read, where it is known
        which they are.
      what: what the adapter is called in messages.

    Raises:
      ValueError: a copy is not what the base has.
    """
    leaves = flatten(params)
    copies = {
        f"{PEFT_PREFIX}{module}.base_layer.weight": (path, layer)
        for path in leaves
        if path[-1] == "kernel"
        for layer, module in enumerate(modules_of(model, path))
    }
    for name in stored.keys() & copies.keys():
        path, layer = copies[name]
        leaf = leaves[path]
        if not isinstance(leaf, jax.Array) and model.origin:
            leaf = _read_leaf(model, path, leaf)
        if not _is_copy(stored[name], leaf, layer if is_stacked(path) else None):
            raise ValueError(
                f"{what} comes with {name}, which is not the base's {join_path(path)}: it was made"
                " on other weights. Load the base it was made on, or merge the adapter in PEFT and"
                " load the result"
            )
    return {name: tensor for name, tensor in stored.items() if name not in copies}


def _read_leaf(model: Model, path: Path, leaf: Any) -> jax.Array:
    """A leaf of the base from its files, in the dtype that it is wanted in."""
    whole = np.empty(leaf.shape, leaf.dtype)
    source = open_sources(FilePath(model.origin), model)[path]
    source.read_into(whole, tuple((0, size) for size in leaf.shape))
    return jnp.asarray(whole)


def _is_copy(tensor: StoredTensor, leaf: Any, layer: int | None) -> bool:
    """Whether a stored [out, in] is a leaf's kernel [in, out], in the leaf's dtype."""
    shape = leaf.shape if layer is None else leaf.shape[1:]
    if tensor.shape != shape[::-1]:
        return False
    if not isinstance(leaf, jax.Array):
        return True
    kernel = leaf if layer is None else leaf[layer]
    values = read_tensor(tensor).T.astype(kernel.dtype)
    # The parts of this process: others compare theirs.
    return all(
        np.array_equal(np.asarray(shard.data), values[shard.index])
        for shard in kernel.addressable_shards
    )


def check_tied(model: Model, stored: Mapping[str, StoredTensor], *, what: str) -> None:
    """Checks that an embedding that is the head too was not trained apart from it.

    Raises:
      ValueError: it was.
    """
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
            f"{what} has {HEAD} and the embedding apart, and the model's config.json ties them;"
            " such a model is not implemented. Save it in PEFT as a whole, with"
            " tie_word_embeddings set to false"
        )


def _sort(
    stored: Mapping[str, StoredTensor], model: Model, ends: tuple[str, ...], what: str
) -> _Found:
    """What each tensor is of.

    Raises:
      ValueError: a tensor is of nothing in this model, or a module or a layer lacks one.
    """
    modules, leaves = {}, {}
    for path, hf_name in model.hf_names().items():
        for layer, module in enumerate(modules_of(model, path)):
            leaves[PEFT_PREFIX + hf_name.name(layer)] = path
            if path[-1] == "kernel":
                modules[PEFT_PREFIX + module] = (path, module)
    found = _Found({}, {})
    unknown = []
    for name, tensor in stored.items():
        end = next((end for end in ends if name.endswith(f".{end}")), "")
        of = modules.get(name.removesuffix(f".{end}")) if end else None
        if of:
            found.adapted.setdefault(of[0], {}).setdefault(of[1], {})[end] = tensor
        elif name in leaves:
            found.trained[leaves[name]] = found.trained.get(leaves[name], 0) + 1
        elif not (name == _HEAD_TENSOR and model.config.tie_word_embeddings):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{what} does not fit this {model.family.model_type} model: it has {listing(unknown)},"
            " for which the model has no place"
        )
    if not found.adapted:
        raise ValueError(f"{what} has no tensors that adapt a kernel")
    _check_complete(found, model, ends, what)
    return found


def _check_complete(found: _Found, model: Model, ends: tuple[str, ...], what: str) -> None:
    for path, own in found.adapted.items():
        missing = [
            f"{module}.{end}"
            for module, tensors in own.items()
            for end in ends
            if end not in tensors
        ]
        if missing:
            raise ValueError(f"{what} lacks {listing(missing)}")
        _check_layers(path, len(own), model, what)
    for path, count in found.trained.items():
        _check_layers(path, count, model, what)


def _check_layers(path: Path, count: int, model: Model, what: str) -> None:
    layers = model.config.num_layers if is_stacked(path) else 1
    if count != layers:
        raise ValueError(
            f"{what} covers {join_path(path[:-1])} in {count} layers of {layers}; layers are"
            " stacked here, and an adapter covers all of them"
        )


def _short(chosen: Iterable[Path], everything: Iterable[Path]) -> tuple[str, ...]:
    """For each chosen leaf's module the last parts of its name, as many as mean no other module."""
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


def _lora(config: Mapping[str, Any]) -> LoRA:
    return LoRA(
        rank=_given(config, "r", 8),
        alpha=float(_given(config, "lora_alpha", 8)),
        rank_stabilized=_given(config, "use_rslora", False),
        dropout=float(_given(config, "lora_dropout", 0.0)),
    )


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting's value, or PEFT's default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def _patterns(
    config: Mapping[str, Any],
    found: _Found,
    model: Model,
    kernels: list[Path],
    what: str,
) -> dict[str, dict[str, Any]]:
    """The ranks and alphas of single modules, by names here."""
    patterns: dict[str, dict[str, Any]] = {}
    for setting, common, kind in (
        ("rank_pattern", "r", int),
        ("alpha_pattern", "lora_alpha", float),
    ):
        theirs = config.get(setting) or {}
        patterns[setting] = {}
        for path in found.adapted:
            values = {_first(theirs, module) for module in modules_of(model, path)}
            if len(values) > 1:
                raise ValueError(
                    f"{what} sets {setting} for some layers of {join_path(path[:-1])} and not for"
                    " others, or differently; layers are stacked here and have one"
                )
            (value,) = values
            if value is not None and value != config.get(common):
                patterns[setting][_short([path], kernels)[0]] = kind(value)
    return patterns


def _first(patterns: Mapping[str, Any], module: str) -> Any:
    """The value of the first pattern that matches, by PEFT's rule; None without one."""
    for key, value in patterns.items():
        compile_pattern(key)  # by itself, so that a message shows what was given
        if compile_pattern(rf"(.*\.)?({key})").fullmatch(module):
            return value
    return None


def _boft(config: Mapping[str, Any], found: _Found, what: str) -> BOFT:
    """The method, whose sizes the tensors have."""
    shapes = {
        f"{module}.boft_R": tensors["boft_R"].shape
        for own in found.adapted.values()
        for module, tensors in own.items()
    }
    sizes = {(shape[0], shape[-1]) for shape in shapes.values()}
    if len(sizes) > 1 or any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(
            f"{what} has rotations of several sizes"
            f" ({listing([f'{name} {list(shape)}' for name, shape in shapes.items()])}); here one"
            " block size and number of factors hold for all modules"
        )
    ((factors, size),) = sizes
    return BOFT(
        block_size=size,
        n_butterfly_factors=factors,
        dropout=float(_given(config, "boft_dropout", 0.0)),
    )
