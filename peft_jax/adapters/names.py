"""Which modules a name or a pattern means.

A module is named by its dotted path in the parameters' tree without a layer number, since layers
are stacked: "layers.self_attn.q_proj". Patterns may also be written as for Hugging Face models,
with the number: "model.layers.0.self_attn.q_proj".
"""

from collections.abc import Iterable

from peft_jax.core import STACKED, did_you_mean
from peft_jax.core.patterns import compile_pattern


def matches_name(name: str, module: str) -> bool:
    """Whether `name` is `module` or its last parts: "q_proj" and "self_attn.q_proj" both are.

    Example:
      >>> matches_name("q_proj", "layers.self_attn.q_proj")
      True
      >>> matches_name("proj", "layers.self_attn.q_proj")
      False
    """
    return module == name or module.endswith(f".{name}")


def matches_pattern(pattern: str, module: str, *, n_layers: int = 1) -> bool:
    r"""Whether the regular expression matches the whole of one of the module's names.

    Args:
      pattern: a regular expression; it may number the layers, as Hugging Face's names do.
      module: the dotted name.
      n_layers: how many layers are stacked under the name.

    Raises:
      ValueError: when it is no regular expression, takes too long, or matches some of the stacked
        layers and not others.

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
    # Asked first: a pattern that leaves out a layer also matches names that are not this model's.
    if some := next((count for count in counts if 0 < count < n_layers), 0):
        raise ValueError(
            f"the pattern {pattern!r} matches {rest} in {some} of {n_layers} layers, but layers"
            " are stacked and an adapter covers all of them; leave particular layer numbers out of"
            " it"
        )
    return n_layers in counts or matches(module)


def select_modules(
    targets: str | Iterable[str],
    modules: Iterable[str],
    *,
    n_layers: int = 1,
    setting: str = "target_modules",
) -> list[str]:
    """The modules that names, or one regular expression, choose.

    Args:
      targets: names (a module's last parts), or one regular expression that must match whole.
      modules: what there is to choose from, dotted.
      n_layers: how many layers are stacked under a name.
      setting: what the targets are called in errors.

    Returns:
      The chosen modules, in the order of `modules`.

    Raises:
      ValueError: when a name, or the expression, chooses nothing; near matches are named.
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
                f"{setting} names {name!r}, which matches no module"
                f"{did_you_mean(name, _last_parts(modules))}"
            )
    return [module for module in modules if any(matches_name(name, module) for name in names)]


def _last_parts(modules: Iterable[str]) -> set[str]:
    return {module.rsplit(".", 1)[-1] for module in modules}
