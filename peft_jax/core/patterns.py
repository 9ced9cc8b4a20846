"""Regular expressions from files and flags, which may be wrong or may never come to an end.

`(a+)+$` over thirty letters takes `re` hours, and nothing in the process can stop it. The `regex`
package, which transformers stands on, reads the same expressions and takes a time limit.
"""

import functools
import re
import time

import regex

_SECONDS = 2.0
"""How long an expression may take over all the names it is matched with."""

_LONGEST = 2**16
"""How many characters an expression may have: compiling takes time too."""

_QUICK = 0.01
"""A match shorter than this does not count."""


class Pattern:
    """A regular expression; see `compile_pattern`."""

    def __init__(self, text: str):
        self._text = text
        self._left = _SECONDS
        if len(text) > _LONGEST:
            raise ValueError(
                f"a regular expression has {len(text):,} characters; it may have {_LONGEST:,}"
            )
        try:
            # What counts is what `re` takes for an expression, as Hugging Face PEFT does.
            re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown(text)} is not a regular expression: {error}") from error

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole of `name`.

        Raises:
          ValueError: it has taken more than two seconds.
        """
        start = time.monotonic()
        try:
            return bool(self._compiled.fullmatch(name, timeout=max(self._left, _QUICK)))
        except TimeoutError as error:
            raise ValueError(
                f"the regular expression {shown(self._text)} takes more than {_SECONDS:g} seconds"
                f" over {name!r}: write it without repetitions inside repetitions"
            ) from error
        finally:
            spent = time.monotonic() - start
            if spent > _QUICK:
                self._left -= spent


@functools.lru_cache(maxsize=1024)
def compile_pattern(text: str) -> Pattern:
    r"""A regular expression that is stopped where it takes too long.

    Args:
      text: as `re` reads it.

    Raises:
      ValueError: it is not a regular expression.

    Example:
      >>> compile_pattern(r".*\.(q|v)_proj").fullmatch("layers.self_attn.q_proj")
      True
      >>> compile_pattern("(")
      Traceback (most recent call last):
      ValueError: '(' is not a regular expression: missing ), unterminated subpattern at position 0
    """
    return Pattern(text)


def shown(text: str) -> str:
    """An expression as messages show it, cut where it is long."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
