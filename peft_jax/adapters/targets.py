"""Selects the leaves of a model that are adapted, or trained in full."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qwix import QArray

from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.adapters.method import AdapterMethod, TrainingMethod
from peft_jax.adapters.names import matches_name, matches_pattern, select_modules
from peft_jax.core import Path, Tree, flatten, is_stacked, join_path
from peft_jax.core.validation import check_positive, check_positive_int

ALL_LINEAR = "all-linear"
"""Selects every linear map but the output head, as in Hugging Face PEFT."""

_HEADS = ("lm_head", "classifier")


@dataclasses.dataclass(frozen=True)
class Targets:
    """Leaves of a model that an `AdapterSpec` trains.

    Attributes:
      adapted: Methods by path of the adapted kernel.
      trained: Paths of leaves trained in full, without an adapter.
    """

    adapted: dict[Path, AdapterMethod]
    trained: tuple[Path, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Settings that select the modules to adapt and to train in full.

    Attributes:
      target_modules: Modules to adapt: "all-linear" (every linear map but the output head and
        those of `modules_to_save`), module names (last parts such as "q_proj" or "mlp.up_proj"),
        or one regular expression. With `Full`, "all-linear" selects every parameter of the model.
      exclude_modules: Names, or one regular expression, of modules to leave out.
      rank_pattern: Ranks of modules by name or regular expression; the first match applies.
      alpha_pattern: Alphas of modules by name or regular expression; the first match applies.
      modules_to_save: Names of modules to train in full.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for setting in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, setting)
            if not isinstance(value, str):
                object.__setattr__(self, setting, tuple(value))
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                "modules_to_save must be a list of names, but is the string"
                f" {self.modules_to_save!r}"
            )
        if self.target_modules == ():
            raise ValueError("target_modules is empty; name modules, or give 'all-linear'")
        for pattern, rank in self.rank_pattern.items():
            check_positive_int(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_positive(f"alpha_pattern[{pattern!r}]", alpha)


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
    n_layers = next((kernel_shape(v)[0] for path, v in flat.items() if is_stacked(path)), 1)
    leaves = _leaves_by_module(flat)
    saved = _choose(modules_to_save, leaves, n_layers, "modules_to_save") if modules_to_save else []
    if not isinstance(method, AdapterMethod):
        if rank_pattern or alpha_pattern:
            raise ValueError(
                "rank_pattern and alpha_pattern must be empty, because full fine-tuning has no"
                " ranks"
            )
        chosen = _without(
            list(leaves)
            if target_modules == ALL_LINEAR
            else _choose(target_modules, leaves, n_layers, "target_modules"),
            exclude_modules,
            leaves,
            n_layers,
        )
        modules = sorted({*chosen, *saved})
        trained = tuple(path for module in modules for path in leaves[module])
        _reject_quantized(trained, flat)
        return Targets({}, trained)

    kernels = {join_path(path[:-1]): path for path in flat if path[-1] == "kernel"}
    if target_modules == ALL_LINEAR:
        chosen = [
            module
            for module in kernels
            if module.split(".")[0] not in _HEADS and module not in saved
        ]
    else:
        _reject_embeddings(target_modules, flat)
        chosen = _choose(target_modules, kernels, n_layers, "target_modules")
    chosen = _without(chosen, exclude_modules, kernels, n_layers)
    if both := sorted(set(chosen) & set(saved)):
        raise ValueError(
            f"{', '.join(both)} is in both target_modules and modules_to_save; remove it from one"
            " of them"
        )
    _check_patterns(rank_pattern, "rank_pattern", chosen, n_layers)
    _check_patterns(alpha_pattern, "alpha_pattern", chosen, n_layers)
    method.check_modules(chosen)
    adapted = {}
    for module in chosen:
        own = method.for_module(
            module,
            rank=_first_match(rank_pattern, module, n_layers),
            alpha=_first_match(alpha_pattern, module, n_layers),
        )
        d_in, d_out = kernel_shape(flat[kernels[module]])[-2:]
        own.check_kernel(module, (d_in, d_out))
        adapted[kernels[module]] = own
    trained = tuple(path for module in sorted(saved) for path in leaves[module])
    _reject_quantized(trained, flat)
    return Targets(adapted, trained)


def _leaves_by_module(flat: Mapping[Path, Any]) -> dict[str, list[Path]]:
    leaves: dict[str, list[Path]] = {}
    for path in flat:
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


def _reject_embeddings(targets: str | Collection[str], flat: Mapping[Path, Any]) -> None:
    if isinstance(targets, str):
        return
    embeddings = {join_path(path[:-1]) for path in flat if path[-1] == "embedding"}
    for name in targets:
        if any(matches_name(name, module) for module in embeddings):
            raise ValueError(
                f"target_modules has {name!r}, which is an embedding and not a linear map; train it"
                " with modules_to_save"
            )


def _check_patterns(
    patterns: Mapping[str, Any], setting: str, modules: Collection[str], n_layers: int
) -> None:
    for pattern in patterns:
        try:
            found = any(_matches(pattern, module, n_layers) for module in modules)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        if not found:
            raise ValueError(
                f"{setting} has {pattern!r}, which matches none of the adapted modules"
                f" {', '.join(modules)}"
            )


def _matches(pattern: str, module: str, n_layers: int) -> bool:
    return matches_name(pattern, module) or matches_pattern(pattern, module, n_layers=n_layers)


def _first_match(patterns: Mapping[str, Any], module: str, n_layers: int) -> Any:
    return next((v for pattern, v in patterns.items() if _matches(pattern, module, n_layers)), None)
