"""Converts mappings to frozen dataclasses and back, and checks every key and type.

Ignoring a misspelled key would waste a run. So each key is either a field of the dataclass, or an
error that names the nearest field.
"""

import collections.abc
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from peft_jax.core.suggest import did_you_mean

T = TypeVar("T")


def from_mapping(cls: type[T], given: Mapping[str, Any], *, where: str = "") -> T:
    """Builds a dataclass from a mapping, and nested dataclasses from nested mappings.

    Args:
      cls: Dataclass type. Its annotations may use int, float, bool, str, `Literal`, unions and
        `None`, tuples, mappings with string keys, `Any`, and dataclasses.
      given: Field values by name. A missing field takes its default. So does a field that is
        `None`, unless its annotation allows `None`.
      where: Dotted path of `given` in the whole configuration, for messages.

    Raises:
      ValueError: A key is not a field, a required field is missing, a value has the wrong type, or
        the dataclass itself rejects a value. The message begins with the path.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Sizes:
      ...     rank: int = 8
      ...     alpha: float = 16.0
      >>> from_mapping(Sizes, {"rank": 4}, where="method")
      Sizes(rank=4, alpha=16.0)
      >>> from_mapping(Sizes, {"rnak": 4}, where="method")
      Traceback (most recent call last):
      ValueError: method.rnak is not a setting; did you mean 'rank'? Known: alpha, rank
      >>> from_mapping(Sizes, {"rank": "four"}, where="method")
      Traceback (most recent call last):
      ValueError: method.rank must be an integer; it is 'four'
    """
    annotations = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise ValueError(f"{_join(where, key)} is not a setting{did_you_mean(key, fields)}")
    values = {}
    for name, field in fields.items():
        annotation = annotations[name]
        value = given.get(name)
        if value is None and not (name in given and accepts_none(annotation)):
            if is_required(field):
                raise ValueError(f"{_join(where, name)} must be given")
            continue
        values[name] = convert(value, annotation, where=_join(where, name))
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        named = not where or str(error).startswith((f"{where}.", f"{where} "))
        raise ValueError(str(error) if named else f"{where}: {error}") from error


def to_mapping(settings: Any) -> Any:
    """Converts dataclasses to nested dictionaries of JSON values; inverse of `from_mapping`.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Sizes:
      ...     ranks: tuple[int, ...] = (8, 4)
      >>> to_mapping(Sizes())
      {'ranks': [8, 4]}
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_mapping(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): to_mapping(value) for key, value in settings.items()}
    if isinstance(settings, (tuple, list)):
        return [to_mapping(value) for value in settings]
    return settings


def differences(one: Any, other: Any, *, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the leaves that differ between two nested mappings, by dotted path.

    A missing leaf counts as `None`.

    Example:
      >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
      {'a.c': (2, 3)}
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*one, *(key for key in other if key not in one)]:
            found |= differences(one.get(key), other.get(key), where=_join(where, key))
        return found
    return {} if one == other else {where: (one, other)}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Returns whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def accepts_none(annotation: Any) -> bool:
    """Returns whether an annotation allows `None`."""
    return (
        annotation is None
        or annotation is type(None)
        or annotation is Any
        or any(accepts_none(member) for member in union_members(annotation))
    )


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union; empty for any other annotation."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return ()


def convert(value: Any, annotation: Any, *, where: str) -> Any:
    """Converts a value to the type of its annotation.

    A float accepts an integer, and a tuple accepts a list. A tuple of strings also accepts one
    comma-separated string, as on a command line. No other conversion happens.

    Raises:
      ValueError: The value does not fit the annotation.
    """
    origin = typing.get_origin(annotation)
    if annotation is Any or annotation is object:
        return value
    if union_members(annotation):
        return _convert_union(value, annotation, where=where)
    if origin is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            hint = did_you_mean(str(value), map(str, choices))
            raise ValueError(f"{where} is {value!r}, which is not one of its choices{hint}")
        return value
    if annotation is None or annotation is type(None):
        if value is not None:
            raise _mismatch(where, "None", value)
        return None
    if annotation is bool:
        if not isinstance(value, bool):
            raise _mismatch(where, "true or false", value)
        return value
    if annotation is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _mismatch(where, "an integer", value)
        return value
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _mismatch(where, "a number", value)
        # The comparison is exact for integers that are too large for a float.
        if not abs(value) <= sys.float_info.max:
            raise _mismatch(where, "a finite number", value)
        return float(value)
    if annotation is str:
        if not isinstance(value, str):
            raise _mismatch(where, "a string", value)
        return value
    if origin is tuple or annotation is tuple:
        return _convert_tuple(value, annotation, where=where)
    if origin in (dict, collections.abc.Mapping):
        return _convert_mapping(value, annotation, where=where)
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise _mismatch(where, "a group of settings", value)
        return from_mapping(annotation, value, where=where)  # type: ignore[arg-type]
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise TypeError(f"{where}: no conversion to {annotation}")


def _convert_union(value: Any, annotation: Any, *, where: str) -> Any:
    failures = []
    for member in union_members(annotation):
        try:
            return convert(value, member, where=where)
        except ValueError as error:
            if member is not type(None):
                failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    raise ValueError("; or ".join(str(failure) for failure in failures))


def _convert_tuple(value: Any, annotation: Any, *, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and typing.get_args(annotation) == (str, ...):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise _mismatch(where, "a list", value)
    members = typing.get_args(annotation) or (Any, ...)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise _mismatch(where, f"a list of {len(members)}", value)
    return tuple(
        convert(item, member, where=f"{where}[{index}]")
        for index, (item, member) in enumerate(zip(value, members, strict=True))
    )


def _convert_mapping(value: Any, annotation: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(where, "a mapping of names to values", value)
    _, item = typing.get_args(annotation) or (str, Any)
    return {str(k): convert(v, item, where=_join(where, str(k))) for k, v in value.items()}


def _mismatch(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where} must be {wanted}; it is {_shown(value)}")


def _shown(value: Any) -> str:
    """Returns a value as text, at most 200 characters of it."""
    try:
        text = repr(value)
    # Python limits the digits of a number that it prints.
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
