"""Selects modules by name or regular expression.

A module's name is its dotted path in the parameter tree. It has no layer number, because layers are
stacked: "layers.self_attn.q_proj". Regular expressions may also match Hugging Face names with a
layer number: "model.layers.0.self_attn.q_proj".
"""

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
    if not module.startswith(f"{STACKED}."):
        names = (module, f"model.{module}", f"transformer.{module}")
        return any(matches(name) for name in names)
    rest = module.removeprefix(f"{STACKED}.")
    counts = [
        sum(matches(f"{prefix}.{layer}.{rest}") for layer in range(n_layers))
        for prefix in (STACKED, f"model.{STACKED}", "transformer.h")
    ]
    # Checked first, because a pattern that excludes a layer may also match the names without one.
    if some := next((count for count in counts if 0 < count < n_layers), 0):
        raise ValueError(
            f"the pattern {pattern!r} matches {rest} in {some} of {n_layers} layers, but an adapter"
            r" covers all stacked layers; match every layer number, as with \d+"
        )
    return n_layers in counts or matches(module)


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
