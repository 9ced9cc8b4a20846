"""Lists every setting of a run with type, default and meaning, read from the dataclasses.

`python -m peft_jax.settings` prints this list, and the documentation's page of settings shows it.
Names, types and defaults are the fields of `RunConfig` and of the methods. Meanings are the
`Attributes:` of their docstrings.
"""

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from peft_jax.adapters import METHODS, AdapterSpec, TargetSettings, method_settings
from peft_jax.core.typed_settings import is_required, union_members
from peft_jax.optim import MIXING_RATES
from peft_jax.training.config import RunConfig
from peft_jax.training.method_section import START_SETTINGS

REQUIRED = "required"
"""Default of a setting that must be given."""

OF_THE_METHOD = "the method's"
"""Default of a setting whose default the method decides."""

_LEFT_TO_THE_METHOD = ("train.learning_rate", *(f"mixing.{name}" for name in MIXING_RATES.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a run.

    Attributes:
      name: Dotted name, as in `--config.train.steps=100`.
      type: Allowed values, in words.
      default: The default as it is written in Python, `REQUIRED`, or `OF_THE_METHOD`.
      meaning: Effect of the setting; Markdown in one paragraph.
      methods: Names of the methods that have it; empty for a setting of every run.
    """

    name: str
    type: str
    default: str
    meaning: str
    methods: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """Name without its last part; empty for a setting outside all sections."""
        return self.name.rpartition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that share a prefix.

    Attributes:
      name: Prefix of the settings; empty for those outside all sections.
      summary: First paragraph about the section.
      settings: Settings of the section, in the order of the dataclass.
    """

    name: str
    summary: str
    settings: tuple[Setting, ...]


def settings_reference() -> tuple[Section, ...]:
    """Returns every section of `RunConfig` with its settings.

    Example:
      >>> rows = {one.name: one for section in settings_reference() for one in section.settings}
      >>> rows["checkpoint.every"].type, rows["checkpoint.every"].default
      ('integer', '100')
      >>> rows["method.block_size"].methods
      ('boft', 'oft', 'hybrid')
    """
    return tuple(section for section in _sections(RunConfig, "") if section.settings)


def attributes_of(cls: type) -> dict[str, str]:
    """Returns the `Attributes:` of a class and of its bases, each as one paragraph.

    Args:
      cls: Class with Google-style docstrings.

    Example:
      >>> attributes_of(Setting)["default"]
      'The default as it is written in Python, `REQUIRED`, or `OF_THE_METHOD`.'
    """
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        lines = inspect.cleandoc(one.__dict__.get("__doc__") or "").splitlines()
        if "Attributes:" not in lines:
            continue
        names: list[str] = []
        for line in lines[lines.index("Attributes:") + 1 :]:
            if line and not line.startswith(" "):
                break
            entry = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
            if entry:
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2].strip())
            elif line.strip():
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def to_markdown(sections: Sequence[Section]) -> str:
    """Returns the documentation's page of settings."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run, with its type, its default and its meaning. Each is a flag of",
        "the commands that take `--config`, for example `--config.train.steps=100`, and an",
        "attribute of the `ConfigDict` that a configuration file returns.",
        "`python -m peft_jax.settings` prints this list for the installed version.",
        "",
    ]
    for section in sections:
        title = f"`{section.name}`" if section.name else "Outside all sections"
        lines += [f"## {title}", "", section.summary, ""]
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        for one in section.settings:
            named = not one.methods or one.meaning.startswith(one.methods[0])
            methods = f" Methods: {', '.join(f'`{name}`' for name in one.methods)}."
            cells = (
                f"`{one.name}`",
                one.type,
                one.default if one.default in (REQUIRED, OF_THE_METHOD) else f"`{one.default}`",
                f"{one.meaning}{'' if named else methods}",
            )
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def to_json(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Returns the settings as dictionaries of JSON values."""
    return [
        {**dataclasses.asdict(one), "methods": list(one.methods)}
        for section in sections
        for one in section.settings
    ]


def _sections(cls: Any, name: str) -> Iterator[Section]:
    """Yields the section of a dataclass, and then those of its fields."""
    if cls is AdapterSpec:
        yield _method_section("method")
        return
    hints, meanings = typing.get_type_hints(cls), attributes_of(cls)
    own, inner = [], []
    for field in dataclasses.fields(cls):
        full = f"{name}.{field.name}" if name else field.name
        if full == "optimizer.learning_rate":
            continue  # The setting is train.learning_rate.
        if full in START_SETTINGS:
            continue  # The setting is in the section `method`.
        if dataclasses.is_dataclass(hints[field.name]):
            inner.append((hints[field.name], full))
        else:
            own.append(_setting(field, hints[field.name], full, meanings))
    yield Section(name=name, summary=_summary(cls), settings=tuple(own))
    for one, full in inner:
        yield from _sections(one, full)


def _method_section(name: str) -> Section:
    """Returns the section `method`: the common settings, then those of the methods."""
    hints = typing.get_type_hints(AdapterSpec)
    meanings = attributes_of(TargetSettings) | attributes_of(AdapterSpec)
    settings = [
        Setting(
            name=f"{name}.name",
            type=_choices(METHODS),
            default=REQUIRED,
            meaning="The fine-tuning method.",
        )
    ]
    settings += [
        _setting(field, hints[field.name], f"{name}.{field.name}", meanings)
        for field in dataclasses.fields(AdapterSpec)
        if field.name != "method"
    ]
    settings += [
        _setting(field, int, f"{name}.{field.name}", attributes_of(RunConfig))
        for field in dataclasses.fields(RunConfig)
        if field.name in START_SETTINGS
    ]
    for key in dict.fromkeys(key for known in METHODS for key in method_settings(known)):
        settings.append(_method_setting(name, key))
    summary = "The fine-tuning method, its own settings, and the modules it applies to."
    return Section(name=name, summary=summary, settings=tuple(settings))


def _method_setting(section: str, key: str) -> Setting:
    """Returns a setting that some methods have, with the default of each."""
    owners = [name for name in METHODS if key in method_settings(name)]
    rows = {}
    for owner in owners:
        cls = METHODS[owner]
        (field,) = (one for one in dataclasses.fields(cls) if one.name == key)
        hint = typing.get_type_hints(cls)[key]
        rows[owner] = _setting(field, hint, f"{section}.{key}", attributes_of(cls))
    first = rows[owners[0]]
    defaults: dict[str, list[str]] = {}
    for owner, row in rows.items():
        defaults.setdefault(row.default, []).append(owner)
    text = first.default
    if len(defaults) > 1:
        text = "; ".join(f"{value} ({', '.join(names)})" for value, names in defaults.items())
    meanings: dict[str, list[str]] = {}
    for owner, row in rows.items():
        meanings.setdefault(row.meaning, []).append(owner)
    meaning = first.meaning
    if len(meanings) > 1:
        meaning = " ".join(f"{', '.join(names)}: {said}" for said, names in meanings.items())
    return dataclasses.replace(first, default=text, meaning=meaning, methods=tuple(owners))


def _setting(
    field: dataclasses.Field[Any], annotation: Any, name: str, meanings: Mapping[str, str]
) -> Setting:
    if name in _LEFT_TO_THE_METHOD:
        default = OF_THE_METHOD
    elif is_required(field):
        default = REQUIRED
    elif field.default is not dataclasses.MISSING:
        default = repr(field.default)
    else:
        default = repr(typing.cast(Any, field.default_factory)())
    return Setting(
        name=name,
        type=type_in_words(annotation),
        default=default,
        meaning=_sentence(meanings.get(field.name, "")),
    )


def type_in_words(annotation: Any) -> str:
    """Returns the values that an annotation allows, in words.

    Example:
      >>> type_in_words(int | None), type_in_words(tuple[str, ...])
      ('integer or None', 'names')
    """
    if members := union_members(annotation):
        words = [type_in_words(one) for one in members if one is not types.NoneType]
        if types.NoneType in members:
            words.append("None")
        return " or ".join(words)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _choices(arguments)
    if origin is tuple:
        named = len(arguments) == 2 and arguments[1] is Ellipsis and arguments[0] is str
        return "names" if named else f"tuple of {', '.join(map(_plain, arguments))}"
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of names to {_plain(arguments[1])}s"
    return _plain(annotation)


def _plain(annotation: Any) -> str:
    words = {int: "integer", float: "number", str: "text", bool: "True or False"}
    if annotation is Ellipsis:
        return "…"
    return words.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _choices(values: Any) -> str:
    *first, last = (f'"{value}"' for value in values)
    return f"{', '.join(first)} or {last}" if first else last


def _summary(cls: type) -> str:
    """Returns the first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _sentence(text: str) -> str:
    """Returns a text with a full stop and, unless it begins with a symbol, a capital letter."""
    if not text:
        return text
    symbol = re.match(r"(?!a\b)\w\b", text)
    return f"{text[0] if symbol else text[0].upper()}{text[1:].removesuffix('.')}."
