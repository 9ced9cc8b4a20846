"""Encodes values for transfer between processes: plain data, rebuilt and never trusted.

Only the data of a value are encoded, not its class. An instance of a subclass of `int` becomes a
number, so that none of the program's own methods runs in the test's process. This module uses only
the standard library, because the jail runs it without other packages.
"""

import collections.abc
import decimal
import fractions
import itertools
from collections.abc import Callable

_MAX_ITEMS = 1_000_000
"""Maximum number of items taken from an iterator, which may be infinite."""

_ITEMS: dict[str, Callable] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "iterator": iter,
}
_WORDS: dict[str, Callable] = {
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "decimal": decimal.Decimal,
}


def encode(value):
    """Encodes a value as JSON-serializable data.

    Raises:
      TypeError: The value is not plain data.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, dict):
        pairs = [[encode(key), encode(item)] for key, item in dict.items(value)]
        return ["dict", *pairs]
    for kind, name in (
        (list, "list"),
        (tuple, "tuple"),
        (set, "set"),
        (frozenset, "frozenset"),
        (collections.abc.KeysView, "keys"),
    ):
        if isinstance(value, kind):
            return [name, *map(encode, value)]
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__, value.hex()]
    if isinstance(value, range):
        return ["range", *map(encode, (value.start, value.stop, value.step))]
    if isinstance(value, fractions.Fraction):
        return ["fraction", encode(value.numerator), encode(value.denominator)]
    if isinstance(value, decimal.Decimal):
        return ["decimal", str(value)]
    if isinstance(value, collections.abc.Iterator):
        return ["iterator", *map(encode, itertools.islice(value, _MAX_ITEMS))]
    raise TypeError(f"{type(value).__name__} is not plain data, so that a test cannot compare it")


def decode(data):
    """Decodes a value, which consists only of built-in types.

    Raises:
      Exception: The untrusted data are malformed; the type of error depends on how.
    """
    if data is None or type(data) in (bool, str):
        return data
    if type(data) is not list or not data or type(data[0]) is not str:
        raise ValueError("not an encoded value")
    name, *parts = data
    if name == "int":
        return int(_word(parts), 16)
    if name == "float":
        return float.fromhex(_word(parts))
    if name == "complex":
        real, imaginary = map(float.fromhex, parts)
        return complex(real, imaginary)
    if name == "dict":
        return {decode(key): decode(item) for key, item in parts}
    if name == "range":
        return range(*map(decode, parts))
    if name == "fraction":
        return fractions.Fraction(*map(decode, parts))
    if name in _WORDS:
        return _WORDS[name](_word(parts))
    return _ITEMS[name](list(map(decode, parts)))


def change(value, changed):
    """Applies a function's changes of its copy of an argument to the argument, if it is mutable.

    Args:
      value: Argument.
      changed: Copy after the call.
    """
    if type(value) is not type(changed):
        return
    if isinstance(value, (list, bytearray)):
        value[:] = changed
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(changed)


def _word(parts):
    (word,) = parts
    if type(word) is not str:
        raise ValueError("not an encoded value")
    return word
