"""Binds adapters by name over one base, whose arrays are held once."""

from collections.abc import Iterable, Mapping, Sequence

from peft_jax.adapters.spec import AdapterSpec, AdapterState
from peft_jax.core import Path, Tree, did_you_mean, flatten, is_experts, join_path

Adapters = Mapping[str, tuple[AdapterSpec, AdapterState]]
"""Adapters by name: their specifications and arrays, as `load_adapter` returns them."""


def bind_adapters(params: Tree, adapters: Adapters, names: str | Sequence[str] = ()) -> Tree:
    """Returns the parameters with some of several adapters bound.

    Switching adapters is another call. No array of the base is copied or changed, so results for
    several adapters can be held at once.

    Args:
      params: Parameters of the base.
      adapters: Adapters by name.
      names: Name of the adapter to bind; several names to stack adapters; none for the base alone.
        Stacked low-rank adapters add up. A rotation of a later adapter turns the input of all
        earlier ones, so its place among the names matters.

    Returns:
      A tree for `model(...)`.

    Raises:
      ValueError: A name is not known, an adapter does not fit the base, or two of the stacked
        adapters train the same leaf in full.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from peft_jax.adapters import LoRA
      >>> params = {"mlp": {"kernel": jnp.ones((4, 3))}}
      >>> spec = AdapterSpec(LoRA(rank=1))
      >>> state = spec.init(jax.random.key(0), params)
      >>> adapters = {"sql": (spec, state), "chat": (spec, state)}
      >>> bind_adapters(params, adapters)["mlp"]["kernel"] is params["mlp"]["kernel"]
      True
      >>> both = bind_adapters(params, adapters, ("sql", "chat"))
      >>> both["mlp"]["kernel"].base.base is params["mlp"]["kernel"]
      True
    """
    chosen = find_adapters(params, adapters, (names,) if isinstance(names, str) else tuple(names))
    owners: dict[Path, str] = {}
    adapted: dict[Path, str] = {}
    for name, (spec, _) in chosen.items():
        targets = spec.targets(params)
        for path in targets.trained:
            if other := owners.get(path) or adapted.get(path):
                raise ValueError(
                    f"adapter {name!r} trains {join_path(path)} in full, which adapter {other!r}"
                    " changes too; bind one of them"
                )
            owners[path] = name
        for path in targets.adapted:
            if other := owners.get(path):
                raise ValueError(
                    f"adapter {name!r} adapts {join_path(path)}, which adapter {other!r} trains in"
                    " full; bind one of them"
                )
            adapted[path] = name
    bound = params
    for spec, state in chosen.values():
        bound = spec.bind(bound, state)
    return bound


def find_adapters(params: Tree, adapters: Adapters, names: tuple[str, ...]) -> Adapters:
    """Returns adapters by name, in the order of the names.

    Raises:
      ValueError: A name is not known or is given twice, or the arrays of an adapter do not fit its
        specification on this base.
    """
    found: dict[str, tuple[AdapterSpec, AdapterState]] = {}
    for name in names:
        if name not in adapters:
            raise ValueError(f"there is no adapter {name!r}{did_you_mean(name, adapters)}")
        if name in found:
            raise ValueError(f"adapter {name!r} is named twice; name it once")
        spec, state = adapters[name]
        _check_fits(name, params, spec, state)
        found[name] = spec, state
    return found


def reject_experts(name: str, adapted: Iterable[Path], fault: str) -> None:
    """Raises ValueError if an adapter adapts experts.

    Args:
      name: Name of the adapter.
      adapted: Paths of its adapted kernels.
      fault: What cannot be done with it: "cannot be …".
    """
    of_experts = [join_path(path[:-1]) for path in adapted if is_experts(path)]
    if of_experts:
        raise ValueError(
            f"adapter {name!r} adapts the experts {', '.join(of_experts)}, and {fault}; merge it,"
            " or use adapters of the attention"
        )


def _check_fits(name: str, params: Tree, spec: AdapterSpec, state: AdapterState) -> None:
    """Raises ValueError unless the arrays have the shapes that the base asks for."""
    try:
        expected = spec.abstract(params)
    except ValueError as error:
        raise ValueError(f"adapter {name!r} does not fit this base: {error}") from error
    for tree in ("trainable", "constant"):
        ours, theirs = flatten(getattr(expected, tree)), flatten(getattr(state, tree))
        for path in sorted(ours.keys() | theirs.keys()):
            shapes = [
                list(leaves[path].shape) if path in leaves else "missing"
                for leaves in (theirs, ours)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"adapter {name!r} does not fit this base: {join_path(path)} is {shapes[0]},"
                    f" but the base needs {shapes[1]}"
                )
