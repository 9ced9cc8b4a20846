"""Matches regular expressions from files and flags, with a time limit.

`re` takes hours to match `(a+)+$` with thirty letters, and nothing in the process can stop it. The
`regex` package, a dependency of transformers, reads the same expressions and takes a time limit.
"""

import functools
import re
import time

import regex

_SECONDS = 2.0
"""Time limit of an expression over all names it is matched with."""

_LONGEST = 2**16
"""Maximum number of characters of an expression: compiling takes time too."""

_QUICK = 0.01
"""Matches shorter than this many seconds do not count against the limit."""


class Pattern:
    """A regular expression; see `compile_pattern`."""

    def __init__(self, text: str):
        self._text = text
        self._left = _SECONDS
        if len(text) > _LONGEST:
            raise ValueError(
                f"a regular expression has {len(text):,} characters; the limit is {_LONGEST:,}"
            )
        try:
            # `re` decides what is valid, because Hugging Face PEFT reads expressions with it.
            re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{abbreviate(text)} is not a regular expression: {error}") from error

    def fullmatch(self, name: str) -> bool:
        """Returns whether the expression matches the whole of `name`.

        Raises:
          ValueError: The expression has taken more than two seconds in all.
        """
        start = time.monotonic()
        try:
            return bool(self._compiled.fullmatch(name, timeout=max(self._left, _QUICK)))
        except TimeoutError as error:
            raise ValueError(
                f"the regular expression {abbreviate(self._text)} takes more than {_SECONDS:g}"
                f" seconds to match {name!r}: write it without nested repetitions"
            ) from error
        finally:
            spent = time.monotonic() - start
            if spent > _QUICK:
                self._left -= spent


@functools.lru_cache(maxsize=1024)
def compile_pattern(text: str) -> Pattern:
    r"""Compiles a regular expression whose matching has a time limit.

    Args:
      text: Expression in the syntax of `re`.

    Raises:
      ValueError: `text` is not a regular expression.

    Example:
      >>> compile_pattern(r".*\.(q|v)_proj").fullmatch("layers.self_attn.q_proj")
      True
      >>> compile_pattern("(")
      Traceback (most recent call last):
      ValueError: '(' is not a regular expression: missing ), unterminated subpattern at position 0
    """
    return Pattern(text)


def abbreviate(text: str) -> str:
    """Returns an expression for a message, abbreviated to 80 characters."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
