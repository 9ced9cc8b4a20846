"""Selects the leaves of a model that are adapted, or trained in full."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qwix import QArray

from peft_jax.adapters.embedding_methods import method_of_embedding
from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.adapters.method import AdapterMethod, TrainingMethod
from peft_jax.adapters.names import (
    layers_of_name,
    layers_of_pattern,
    select_layers,
    select_modules,
)
from peft_jax.adapters.shared_experts import SharedByExperts
from peft_jax.adapters.target_settings import ALL_LINEAR, Targets, TargetSettings
from peft_jax.adapters.trainable_tokens import TokensBesideAdapters
from peft_jax.adapters.virtual_method import Dimensions, VirtualMethod
from peft_jax.core import (
    EMBEDDING,
    KERNEL,
    TABLE,
    UNTRAINED,
    Path,
    Tree,
    flatten,
    is_experts,
    is_router,
    is_stacked,
    join_path,
)

_HEADS = ("lm_head", "classifier")


def find_targets(params: Tree, method: TrainingMethod, settings: TargetSettings) -> Targets:
    """Returns the leaves of a model to adapt and to train in full.

    Args:
      params: Model parameters, arrays or shapes.
      method: Fine-tuning method.
      settings: Selection of modules.

    Raises:
      ValueError: A target or a pattern matches nothing, a kernel cannot be adapted, or a leaf would
        be both adapted and trained in full.
    """
    target_modules, exclude_modules = settings.target_modules, settings.exclude_modules
    rank_pattern, alpha_pattern = settings.rank_pattern, settings.alpha_pattern
    modules_to_save = settings.modules_to_save
    flat = flatten(params)
    n_layers = max((kernel_shape(v)[0] for path, v in flat.items() if is_stacked(path)), default=0)
    leaves = _leaves_by_module(flat)
    saved = _choose(modules_to_save, leaves, n_layers, "modules_to_save") if modules_to_save else []
    if isinstance(method, VirtualMethod):
        _check_virtual(method, settings)
        Dimensions.of(params)
        return Targets({}, ())
    if not isinstance(method, AdapterMethod):
        if settings.layers_to_transform:
            raise ValueError(
                f"layers_to_transform must be empty, because {method.name} trains stacked layers"
            )
        if settings.share_experts:
            raise ValueError(
                f"share_experts must be unset, because {method.name} trains whole modules"
            )
        if settings.bias != "none" or settings.trainable_token_indices:
            raise ValueError(
                f"bias must be 'none' and trainable_token_indices empty, because {method.name}"
                f" trains whole modules, but they are {settings.bias!r} and"
                f" {settings.trainable_token_indices}"
            )
        if rank_pattern or alpha_pattern:
            raise ValueError(
                f"rank_pattern and alpha_pattern must be empty, because {method.name} has no ranks"
            )
        possible = [name for name, paths in leaves.items() if method.trains_module(paths)]
        picked = possible
        if target_modules != ALL_LINEAR:
            picked = _choose(target_modules, leaves, n_layers, "target_modules")
            if others := sorted(set(picked) - set(possible)):
                raise ValueError(
                    f"target_modules selects {', '.join(others)}, which {method.name} does not"
                    f" train; it trains {', '.join(sorted(possible))}"
                )
        whole = _without(picked, exclude_modules, leaves, n_layers)
        selected = tuple(path for module in sorted(whole) for path in leaves[module])
        trained = tuple(path for module in sorted({*whole, *saved}) for path in leaves[module])
        _reject_quantized(trained, flat)
        return Targets({}, trained, selected=selected)

    tables = {join_path(path[:-1]): path for path in flat if path[-1] == EMBEDDING}
    kernels = {
        join_path(path[:-1]): path
        for path, leaf in flat.items()
        if path[-1] in (KERNEL, TABLE) and len(kernel_shape(leaf)) > 1
    } | tables
    every: dict[str, tuple[int, ...]] = {
        m: tuple(range(n_layers)) if is_stacked(p) else (0,) for m, p in kernels.items()
    }
    chosen: dict[str, tuple[int, ...]]
    if target_modules == ALL_LINEAR and method.maps_tokens:
        chosen = {_only_table(tables): (0,)}
    elif target_modules == ALL_LINEAR:
        chosen = {
            module: layers
            for module, layers in every.items()
            if module.split(".")[0] not in _HEADS
            and module not in (*saved, *tables)
            and kernels[module][-1] != TABLE
            and not _is_of_mixture(kernels[module])
        }
    else:
        chosen = select_layers(target_modules, kernels, n_layers=n_layers, setting="target_modules")
    if exclude_modules:
        excluded = select_layers(
            exclude_modules, kernels, n_layers=n_layers, setting="exclude_modules"
        )
        chosen = _less(chosen, excluded)
        if not chosen:
            raise ValueError(f"exclude_modules {exclude_modules!r} leaves nothing to train")
    if settings.layers_to_transform:
        chosen = _in_layers(chosen, settings.layers_to_transform, kernels, n_layers)
    if both := sorted(set(chosen) & set(saved)):
        raise ValueError(
            f"{', '.join(both)} is in both target_modules and modules_to_save; remove it from one"
            " of them"
        )
    ranks = _values(rank_pattern, "rank_pattern", chosen, n_layers)
    alphas = _values(alpha_pattern, "alpha_pattern", chosen, n_layers)
    counts = {m: kernel_shape(flat[p])[0] if is_stacked(p) else 1 for m, p in kernels.items()}
    chosen = {
        module: _rows(module, layers, counts[module], n_layers, ranks, alphas)
        if is_stacked(kernels[module])
        else layers
        for module, layers in chosen.items()
    }
    method.check_modules(chosen)
    adapted, by_layer = {}, {}
    for module, layers in chosen.items():
        path = kernels[module]
        d_in, d_out = kernel_shape(flat[path])[-2:]
        own: list[AdapterMethod | None] = [None] * counts[module]
        for layer in layers:
            one = method.for_module(
                module, rank=ranks.get((module, layer)), alpha=alphas.get((module, layer))
            )
            shared = is_experts(path) and settings.share_experts
            if shared:
                one.check_shared_experts(module)
            elif is_experts(path):
                one.check_experts(module)
            if module in tables:
                one = method_of_embedding(one, module)
            elif one.maps_tokens:
                raise ValueError(
                    f"target_modules selects {module}, but {method.name} is for embeddings:"
                    f" {', '.join(tables)}"
                )
            one.check_kernel(module, (d_in, d_out))
            own[layer] = SharedByExperts(of=one) if shared else one
        different = [one for one in own if one is not None]
        adapted[path] = max(different, key=lambda one: getattr(one, "rank", 0))
        if None in own or any(one != different[0] for one in different):
            adapted[path].check_layers(module, own)
            by_layer[path] = tuple(own)
    if settings.share_experts and not any(one.spans_groups for one in adapted.values()):
        raise ValueError(
            "share_experts is set, but target_modules selects no experts; name them, as"
            " experts.gate_up_proj and experts.down_proj of a mixture of experts, or unset it"
        )
    if tokens := settings.trainable_token_indices:
        module = _only_table(tables)
        if module in (*chosen, *saved):
            raise ValueError(
                f"trainable_token_indices trains rows of {module}, which target_modules or"
                " modules_to_save select too; remove it from one of them"
            )
        beside = TokensBesideAdapters(token_indices=tokens)
        rows, features = kernel_shape(flat[tables[module]])
        beside.check_kernel(module, (rows, features))
        adapted[tables[module]] = beside
    trained = tuple(path for module in sorted(saved) for path in leaves[module])
    biases = _biases(settings.bias, flat, adapted, by_layer, trained)
    _reject_quantized(trained, flat)
    return Targets(adapted, (*trained, *biases), by_layer, biases)


def _check_virtual(method: VirtualMethod, settings: TargetSettings) -> None:
    """Rejects settings that select modules, of which virtual tokens change none."""
    defaults = TargetSettings()
    for field in dataclasses.fields(TargetSettings):
        value = getattr(settings, field.name)
        if value != (neutral := getattr(defaults, field.name)):
            raise ValueError(
                f"{field.name} is {value!r}, but must be {neutral!r}, because {method.name} trains"
                " virtual tokens and no modules"
            )


def _biases(
    which: str,
    flat: Mapping[Path, Any],
    adapted: Mapping[Path, AdapterMethod],
    by_layer: Mapping[Path, tuple[AdapterMethod | None, ...]],
    trained: Collection[Path],
) -> tuple[Path, ...]:
    """Returns the biases to train beside the adapters, without those that are trained already.

    Raises:
      ValueError: There are none, or a module is adapted in some layers only.
    """
    if which == "none":
        return ()
    every = [path for path in flat if path[-1] == "bias"]
    if which == "adapted":
        every = [path for path in every if (*path[:-1], "kernel") in adapted]
        for path in every:
            if None in by_layer.get((*path[:-1], "kernel"), ()):
                raise ValueError(
                    f"bias is 'adapted', but {join_path(path[:-1])} is adapted in some layers only,"
                    " and stacked biases are trained in all; give bias 'all'"
                )
    if not every:
        whose = "the model has" if which == "all" else "the adapted modules have"
        raise ValueError(f"bias is {which!r}, but {whose} no biases; give 'none'")
    return tuple(path for path in every if path not in trained)


def _less(
    chosen: Mapping[str, tuple[int, ...]], excluded: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns the layers of modules that are not excluded."""
    left = {
        module: tuple(layer for layer in layers if layer not in excluded.get(module, ()))
        for module, layers in chosen.items()
    }
    return {module: layers for module, layers in left.items() if layers}


def _in_layers(
    chosen: Mapping[str, tuple[int, ...]],
    wanted: Collection[int],
    kernels: Mapping[str, Path],
    n_layers: int,
) -> dict[str, tuple[int, ...]]:
    """Returns the wanted layers of stacked modules.

    Raises:
      ValueError: There is no such layer, or nothing is left.
    """
    if not n_layers:
        raise ValueError(
            f"layers_to_transform is {list(wanted)}, but this model's layers are not stacked; name"
            " their modules with target_modules"
        )
    if beyond := [layer for layer in wanted if layer >= n_layers]:
        raise ValueError(
            f"layers_to_transform has {beyond[0]}, but the model's layers are 0 to {n_layers - 1}"
        )
    left = {
        module: tuple(layer for layer in layers if layer in wanted)
        for module, layers in chosen.items()
        if is_stacked(kernels[module])
    }
    found = {module: layers for module, layers in left.items() if layers}
    if not found:
        raise ValueError(f"layers_to_transform {list(wanted)} leaves nothing to adapt")
    return found


def _rows(
    module: str,
    layers: tuple[int, ...],
    rows: int,
    n_layers: int,
    *values: Mapping[tuple[str, int], Any],
) -> tuple[int, ...]:
    """Returns the rows of a stacked kernel that are adapted.

    Args:
      module: Name of the kernel's module.
      layers: Layers that are selected.
      rows: Number of layers that have the module.
      n_layers: Number of layers.
      *values: Ranks and alphas by module and layer.

    Raises:
      ValueError: Only some layers have the module, and these would differ.
    """
    if rows == n_layers:
        return layers
    each = {tuple(one.get((module, layer)) for one in values) for layer in layers}
    if len(layers) < n_layers or len(each) > 1:
        raise ValueError(
            f"{module} is in {rows} of {n_layers} layers, and its layers cannot be adapted"
            " differently; select it without layer numbers, or leave it out with exclude_modules"
        )
    return tuple(range(rows))


def _values(
    patterns: Mapping[str, Any],
    setting: str,
    chosen: Mapping[str, tuple[int, ...]],
    n_layers: int,
) -> dict[tuple[str, int], Any]:
    """Returns the value of the first pattern that matches, by module and layer.

    Raises:
      ValueError: A pattern matches none of the adapted modules.
    """
    found: dict[tuple[str, int], Any] = {}
    for pattern, value in patterns.items():
        matched = False
        for module, layers in chosen.items():
            try:
                of_pattern = layers_of_name(pattern, module, n_layers=n_layers) or (
                    layers_of_pattern(pattern, module, n_layers=n_layers)
                )
            except ValueError as error:
                raise ValueError(f"{setting}: {error}") from error
            for layer in set(of_pattern) & set(layers):
                matched = True
                found.setdefault((module, layer), value)
        if not matched:
            raise ValueError(
                f"{setting} has {pattern!r}, which matches none of the adapted modules"
                f" {', '.join(chosen)}"
            )
    return found


def _leaves_by_module(flat: Mapping[Path, Any]) -> dict[str, list[Path]]:
    leaves: dict[str, list[Path]] = {}
    for path in flat:
        if path[-1] not in UNTRAINED:
            leaves.setdefault(join_path(path[:-1]), []).append(path)
    return leaves


def _choose(
    targets: str | Collection[str], modules: Iterable[str], n_layers: int, setting: str
) -> list[str]:
    return select_modules(targets, modules, n_layers=n_layers, setting=setting)


def _without(
    chosen: list[str], excluded: str | Collection[str], modules: Iterable[str], n_layers: int
) -> list[str]:
    if not excluded:
        return chosen
    taken_out = set(_choose(excluded, modules, n_layers, "exclude_modules"))
    left = [module for module in chosen if module not in taken_out]
    if not left:
        raise ValueError(f"exclude_modules {excluded!r} leaves nothing to train")
    return left


def _reject_quantized(trained: Collection[Path], flat: Mapping[Path, Any]) -> None:
    """Rejects quantized leaves, because rounding would discard small updates."""
    quantized = [join_path(path[:-1]) for path in trained if isinstance(flat[path], QArray)]
    if quantized:
        raise ValueError(
            f"{', '.join(quantized)} cannot be trained in full, because it is quantized: adapt it,"
            ' exclude it, or load the base model with quantization "none"'
        )


def _is_of_mixture(path: Path) -> bool:
    """Returns whether a kernel belongs to a mixture of experts, or to its router."""
    return is_experts(path) or is_router(path)


def _only_table(tables: Mapping[str, Path]) -> str:
    """Returns the module of a model's embedding.

    Raises:
      ValueError: There is none, or there are several.
    """
    if len(tables) != 1:
        found = f"the embeddings {', '.join(tables)}" if tables else "no embedding"
        raise ValueError(
            f"the model has {found}, but trainable tokens need one; name it in target_modules of"
            " the method trainable_tokens"
        )
    return next(iter(tables))
