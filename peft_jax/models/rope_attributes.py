"""Reads rotary position embeddings from `config.json`, as transformers 4 and 5 write them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.models.attributes import check_kind, given
from peft_jax.models.rope import RotarySettings
from peft_jax.models.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
)

_ORIGINAL = "original_max_position_embeddings"

_SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "proportional": ProportionalScaling,
}

ROTARY_ATTRIBUTES = frozenset(
    {
        "max_position_embeddings",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)
"""Attributes of `config.json` that `read_rotary` reads."""


def read_rotary(
    hf_config: Mapping[str, Any],
    *,
    head_dim: int,
    default_theta: float = 10000.0,
    default_part: float | None = None,
) -> RotarySettings:
    """Reads the rotary embedding from a `config.json` of transformers 4 or 5.

    transformers 5 writes `rope_parameters`, which holds `rope_type` and `rope_theta`. Earlier
    versions write `rope_theta` and `rope_scaling`, which holds `type` or `rope_type`.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H.
      default_theta: Base where none is given.
      default_part: Part of a head's features that is rotated where none is given; None if the
        family rotates all features.

    Raises:
      ValueError: The rope type is not implemented, or one of its parameters is missing or
        unknown.
    """
    parameters = _joined_parameters(hf_config)
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"config.json's rope_parameters differ by layer type ({', '.join(nested)}), which is"
            " not implemented"
        )
    theta = given(hf_config, "rope_theta", default_theta)
    return _read_parameters(parameters, hf_config, head_dim, theta, default_part)


def read_rotary_by_type(
    hf_config: Mapping[str, Any], *, head_dim: int, thetas: Mapping[str, float]
) -> dict[str, RotarySettings]:
    """Reads the rotary embedding of each type of layer, as Gemma 3 has them.

    transformers 5 writes `rope_parameters` by type. Earlier versions write `rope_theta` and
    `rope_scaling` for full attention, and `rope_local_base_freq` for sliding attention.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H.
      thetas: Base of each type where none is given.

    Raises:
      ValueError: As `read_rotary`, or the parameters are not given by type.
    """
    bases = {
        "full_attention": given(hf_config, "rope_theta", thetas["full_attention"]),
        "sliding_attention": given(hf_config, "rope_local_base_freq", thetas["sliding_attention"]),
    }
    by_type: dict[str, Any] = {"full_attention": hf_config.get("rope_scaling")}
    check_kind(hf_config, "rope_scaling")
    if hf_config.get("rope_parameters") is not None:
        check_kind(hf_config, "rope_parameters")
        by_type = {**by_type, **hf_config["rope_parameters"]}
    for name, value in by_type.items():
        if name not in bases or not isinstance(value, Mapping | None):
            raise ValueError(
                f"config.json's rope_parameters set {name} = {value!r}, but must have parameters"
                f" for {' and '.join(bases)}"
            )
    return {
        name: _read_parameters(
            {key: value for key, value in (by_type.get(name) or {}).items() if value is not None},
            hf_config,
            head_dim,
            theta,
            None,
        )
        for name, theta in bases.items()
    }


def _joined_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("rope_parameters", "rope_scaling"):
        check_kind(hf_config, name)
    new, old = (hf_config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError(
            f"config.json sets rope_parameters = {new!r} and rope_scaling = {old!r}, which disagree"
        )
    return {name: value for name, value in (new or old).items() if value is not None}


def _read_parameters(
    parameters: dict[str, Any],
    hf_config: Mapping[str, Any],
    head_dim: int,
    default_theta: float,
    default_part: float | None,
) -> RotarySettings:
    for name in ("rope_theta", "partial_rotary_factor", "rope_type", "type"):
        check_kind(parameters, name, where="config.json's rope parameters set")
    theta = parameters.pop("rope_theta", default_theta)
    if parameters.get("rope_type") == "proportional":
        # The other pairs keep their places, with a frequency of zero.
        parameters["part"] = parameters.pop("partial_rotary_factor", 1.0)
        default_part = 1.0
    part = parameters.pop(
        "partial_rotary_factor", given(hf_config, "partial_rotary_factor", default_part or 1.0)
    )
    if part != 1.0 and default_part is None:
        raise ValueError(
            f"config.json sets partial_rotary_factor = {part!r}, but only 1.0 is implemented"
        )
    if part > 1.0:
        raise ValueError(
            f"config.json sets partial_rotary_factor = {part!r}, but must have at most 1.0"
        )
    old_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", old_type)
    return RotarySettings(
        head_dim=int(head_dim * part),
        theta=float(theta),
        scaling=_read_scaling(kind, parameters, hf_config),
    )


def _as_float(name: str, value: Any) -> Any:
    """Returns the numbers of a parameter as floats, which JSON may write without a point."""
    if isinstance(value, list):
        return tuple(map(float, value))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and name != _ORIGINAL else value


def _read_scaling(
    kind: str, parameters: dict[str, Any], hf_config: Mapping[str, Any]
) -> Scaling | None:
    if kind == "default":
        known: set[str] = set()
    elif kind in _SCALINGS:
        known = {field.name for field in dataclasses.fields(_SCALINGS[kind])}
    else:
        raise ValueError(
            f"config.json sets the rope type {kind!r}, which is not implemented"
            f"{did_you_mean(kind, ('default', *_SCALINGS))}"
        )
    if _ORIGINAL in known:
        written = parameters.get(_ORIGINAL, hf_config.get("max_position_embeddings"))
        original = given(hf_config, _ORIGINAL, written)
        parameters = {**parameters, _ORIGINAL: original}
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(
                f"config.json sets {name} = {value!r} for the rope type {kind!r}, which is not"
                f" known{did_you_mean(name, known)}"
            )
    if kind == "default":
        return None
    for name in parameters:
        check_kind(parameters, name, where="config.json's rope parameters set")
    if kind == "longrope" and parameters[_ORIGINAL] is not None:
        longest = given(hf_config, "max_position_embeddings", parameters[_ORIGINAL])
        parameters.setdefault("factor", longest / parameters[_ORIGINAL])
    parameters = {name: _as_float(name, value) for name, value in parameters.items()}
    settings = _SCALINGS[kind]
    required = {
        field.name
        for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING and parameters.get(field.name) is None
    }
    if required:
        raise ValueError(
            f"config.json sets the rope type {kind!r} without {', '.join(sorted(required))}"
        )
    return settings(**parameters)
