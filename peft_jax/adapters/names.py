"""Selects modules by name or regular expression.

A module's name is its dotted path in the parameter tree. It has no layer number if layers are
stacked: "layers.self_attn.q_proj". Names and regular expressions may also match Hugging Face names
with a layer number: "model.layers.0.self_attn.q_proj". A model without stacked layers has zero of
them, and its names are taken as they are.
"""

import re
from collections.abc import Iterable

from peft_jax.core import STACKED, did_you_mean
from peft_jax.core.patterns import compile_pattern


def matches_name(name: str, module: str) -> bool:
    """Returns whether `name` is `module` or its last parts, such as "self_attn.q_proj".

    Example:
      >>> matches_name("q_proj", "layers.self_attn.q_proj")
      True
      >>> matches_name("proj", "layers.self_attn.q_proj")
      False
    """
    return module == name or module.endswith(f".{name}")


def matches_pattern(pattern: str, module: str, *, n_layers: int = 1) -> bool:
    r"""Returns whether a regular expression matches the whole of one of a module's names.

    Args:
      pattern: Regular expression; it may match Hugging Face names with layer numbers.
      module: Dotted name of the module.
      n_layers: Number of layers stacked under the name.

    Raises:
      ValueError: `pattern` is not a regular expression, takes too long, or matches some of the
        stacked layers but not others.

    Example:
      >>> matches_pattern(r".*\.(q|v)_proj", "layers.self_attn.q_proj")
      True
      >>> matches_pattern(r"model\.layers\.\d+\.self_attn\.q_proj", "layers.self_attn.q_proj")
      True
    """
    matches = compile_pattern(pattern).fullmatch
    if not _is_stacked(module, n_layers):
        names = (module, f"model.{module}", f"transformer.{module}")
        return any(matches(name) for name in names)
    matched = len(layers_of_pattern(pattern, module, n_layers=n_layers))
    if 0 < matched < n_layers:
        rest = module.removeprefix(f"{STACKED}.")
        raise ValueError(
            f"the pattern {pattern!r} matches {rest} in {matched} of {n_layers} layers, but must"
            r" match all of them, because layers are stacked; match every layer number, as with \d+"
        )
    return matched > 0


def layer_name(module: str, layer: int) -> str:
    """Returns the name of one layer's module.

    Example:
      >>> layer_name("layers.mlp.up_proj", 3), layer_name("lm_head", 0)
      ('layers.3.mlp.up_proj', 'lm_head')
    """
    if not module.startswith(f"{STACKED}."):
        return module
    return module.replace(".", f".{layer}.", 1)


def layers_of_pattern(pattern: str, module: str, *, n_layers: int) -> tuple[int, ...]:
    r"""Returns the layers of a module whose names a regular expression matches as a whole.

    Args:
      pattern: Regular expression; it may match Hugging Face names with layer numbers.
      module: Dotted name of the module, without a layer number.
      n_layers: Number of layers stacked under the name. A module outside the layers has layer 0.

    Raises:
      ValueError: `pattern` is not a regular expression, or takes too long.

    Example:
      >>> layers_of_pattern(r".*layers\.[01]\..*q_proj", "layers.self_attn.q_proj", n_layers=4)
      (0, 1)
      >>> layers_of_pattern(".*q_proj", "layers.self_attn.q_proj", n_layers=2)
      (0, 1)
    """
    matches = compile_pattern(pattern).fullmatch
    if not _is_stacked(module, n_layers):
        return (0,) if matches_pattern(pattern, module, n_layers=n_layers) else ()
    found = [
        tuple(layer for layer, name in enumerate(names) if matches(name))
        for names in zip(*_numbered(module, n_layers), strict=True)
    ]
    # Looked at first, because a pattern that excludes a layer may also match the name without one.
    if some := next((layers for layers in found if 0 < len(layers) < n_layers), ()):
        return some
    return tuple(range(n_layers)) if any(found) or matches(module) else ()


def layers_of_name(name: str, module: str, *, n_layers: int) -> tuple[int, ...]:
    """Returns the layers of a module that a name, the last parts of the module's, selects.

    Args:
      name: Name, with or without a layer number.
      module: Dotted name of the module, without a layer number.
      n_layers: Number of layers stacked under the name. A module outside the layers has layer 0.

    Example:
      >>> layers_of_name("q_proj", "layers.self_attn.q_proj", n_layers=2)
      (0, 1)
      >>> layers_of_name("layers.1.self_attn.q_proj", "layers.self_attn.q_proj", n_layers=2)
      (1,)
    """
    if not _is_stacked(module, n_layers):
        return (0,) if matches_name(name, module) else ()
    if matches_name(name, module):
        return tuple(range(n_layers))
    return tuple(
        layer
        for layer, names in enumerate(_numbered(module, n_layers))
        if any(matches_name(name, one) for one in names)
    )


def _is_stacked(module: str, n_layers: int) -> bool:
    return n_layers > 0 and module.startswith(f"{STACKED}.")


def _numbered(module: str, n_layers: int) -> list[tuple[str, ...]]:
    """Returns, for each layer, the names of a stacked module with the layer's number."""
    rest = module.removeprefix(f"{STACKED}.")
    prefixes = (STACKED, f"model.{STACKED}", "transformer.h")
    return [tuple(f"{prefix}.{layer}.{rest}" for prefix in prefixes) for layer in range(n_layers)]


def select_layers(
    targets: str | Iterable[str],
    modules: Iterable[str],
    *,
    n_layers: int,
    setting: str,
) -> dict[str, tuple[int, ...]]:
    """Selects modules and their layers by names or by one regular expression.

    Args:
      targets: Names (a module's last parts, with or without a layer number), or one regular
        expression for the whole name.
      modules: Dotted names to select from.
      n_layers: Number of layers stacked under a name.
      setting: Name of the setting that holds `targets`, for messages.

    Returns:
      The layers of the selected modules, in the order of `modules`; (0,) outside the layers.

    Raises:
      ValueError: A name or the expression matches no module; the message names near matches.
    """
    modules = list(modules)
    if isinstance(targets, str):
        try:
            chosen = {m: layers_of_pattern(targets, m, n_layers=n_layers) for m in modules}
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        if not any(chosen.values()):
            raise ValueError(
                f"{setting} {targets!r} (one string is a regular expression) matches no"
                f" module{_near(targets, modules, n_layers)}"
            )
        return {module: layers for module, layers in chosen.items() if layers}
    found: dict[str, set[int]] = {module: set() for module in modules}
    for name in targets:
        selected = {m: layers_of_name(name, m, n_layers=n_layers) for m in modules}
        if not any(selected.values()):
            raise ValueError(
                f"{setting} has {name!r}, which matches no module{_near(name, modules, n_layers)}"
            )
        for module, layers in selected.items():
            found[module].update(layers)
    return {module: tuple(sorted(layers)) for module, layers in found.items() if layers}


def _near(name: str, modules: Iterable[str], n_layers: int) -> str:
    """Returns the nearest names for a message, and the layers there are if one is named."""
    if n_layers and re.search(r"\.\d+\.", name.replace("\\", "")):
        return f"; the model's layers are 0 to {n_layers - 1}"
    return did_you_mean(name, _last_parts(modules))


def select_modules(
    targets: str | Iterable[str],
    modules: Iterable[str],
    *,
    n_layers: int = 1,
    setting: str = "target_modules",
) -> list[str]:
    """Selects modules by names or by one regular expression.

    Args:
      targets: Names (a module's last parts), or one regular expression for the whole name.
      modules: Dotted names to select from.
      n_layers: Number of layers stacked under a name.
      setting: Name of the setting that holds `targets`, for messages.

    Returns:
      The selected modules, in the order of `modules`.

    Raises:
      ValueError: A name or the expression matches no module; the message names near matches.
    """
    modules = list(modules)
    if isinstance(targets, str):
        try:
            chosen = [m for m in modules if matches_pattern(targets, m, n_layers=n_layers)]
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        if not chosen:
            raise ValueError(
                f"{setting} {targets!r} (one string is a regular expression) matches no"
                f" module{did_you_mean(targets, _last_parts(modules))}"
            )
        return chosen
    names = list(targets)
    for name in names:
        if not any(matches_name(name, module) for module in modules):
            raise ValueError(
                f"{setting} has {name!r}, which matches no module"
                f"{did_you_mean(name, _last_parts(modules))}"
            )
    return [module for module in modules if any(matches_name(name, module) for name in names)]


def _last_parts(modules: Iterable[str]) -> set[str]:
    return {module.rsplit(".", 1)[-1] for module in modules}
