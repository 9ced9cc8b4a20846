r"""Ends commands with an exit code and one message in place of a traceback.

Every command of the project is a function decorated with `command`, the one place that catches
what ends it:

- errors that derive from `EndingError`, such as `RefusedError`;
- a `ValueError` or `FloatingPointError` that the project's own code raises;
- system errors: a missing file, a full disk, a read-only folder, a lost connection;
- memory exhaustion, or a missing JAX backend;
- Ctrl-C, and a reader that closes the output's pipe.

Anything else is a bug: the command ends with its traceback and exit code 1. So does a `ValueError`
that a library raises. With --traceback, the caught errors also print their traceback before the
message.
"""

import dataclasses
import errno
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import MappingProxyType
from typing import ParamSpec

from peft_jax.runtime.errors import EndingError, ExitCode
from peft_jax.runtime.log_lines import show_log_lines
from peft_jax.runtime.printable import printable

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Ending:
    """Message and exit code of a command that an error ends.

    Attributes:
      message: Message for the user; empty if nobody reads it.
      code: Exit code.
    """

    message: str
    code: int


PROGRAM = "peft-jax"
"""The console script, which puts a command's whole name in place of its own."""

OURS = ("peft_jax", "eval", "kernels_pallas", "configs", "examples", "__main__")
"""Packages whose `ValueError`s are messages to the user."""

_LESS_MEMORY = (
    "a larger train.gradient_accumulation, execution.remat=full or, on TPUs,"
    " execution.async_collectives=false need less"
)

_LONGEST_MESSAGE = 4000

_OS_ERROR_CODE = re.compile(r"\[os_error_code='(\d+)'")

# Errors of a path given by the user, which end the command before it does any work.
_UNUSABLE_PATH = MappingProxyType(
    {
        errno.ENOENT: "give a path that exists",
        errno.ENOTDIR: "give a path whose parents are folders",
        errno.EISDIR: "give a file",
        errno.EEXIST: "give another path",
        errno.EACCES: "give a path that this user may use",
        errno.EPERM: "give a path that this user may use",
        errno.EROFS: "give a folder that can be written to",
        errno.ELOOP: "give a path without a link to itself",
        errno.ENAMETOOLONG: "give a shorter path",
    }
)
_HINTS = MappingProxyType(
    _UNUSABLE_PATH
    | {
        errno.ENOSPC: "free some space or give a folder on another disk",
        errno.EDQUOT: "free some space or give a folder on another disk",
        errno.EFBIG: "files may not grow so large here (ulimit -f)",
        errno.EMFILE: "raise the number of open files (ulimit -n)",
    }
)


def command(
    name: str, *, stopped: str = "stopped"
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Decorates a function as a command that returns its exit code whatever ends it.

    Args:
      name: Name of the command; messages begin with it.
      stopped: Message after Ctrl-C.

    Example:
      >>> @command("measure")
      ... def main(size):
      ...     if size < 0:
      ...         raise ValueError(f"the size must be positive, but is {size}")
      >>> int(main(1)), int(main(-1))
      (0, 2)
    """

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
            _write_any_text()
            show_log_lines()
            try:
                try:
                    code = main(*args, **kwargs)
                except SystemExit:
                    sys.stdout.flush()
                    raise
                sys.stdout.flush()
                return ExitCode.DONE if code is None else code
            except BaseException as error:
                ending = explain(error, stopped=stopped)
                if ending is None:
                    raise
                if _wants_traceback(*args):
                    traceback.print_exc()
                if ending.code == ExitCode.NO_READER:
                    _give_up_output()
                elif ending.message:
                    say(ending.message, name=name)
                return ending.code

        return guarded

    return decorate


def explain(error: BaseException, *, stopped: str = "stopped") -> Ending | None:
    """Returns how an error ends a command; None if the error is a bug.

    Example:
      >>> explain(FileNotFoundError(2, "No such file or directory", "rows.jsonl"))
      Ending(message='rows.jsonl: no such file or directory; give a path that exists', code=2)
      >>> explain(KeyError("rank"))
    """
    if isinstance(error, EndingError):
        return Ending(str(error), int(error.exit_code))
    if isinstance(error, KeyboardInterrupt):
        return Ending(stopped, int(ExitCode.INTERRUPTED))
    if isinstance(error, BrokenPipeError):
        return Ending("", int(ExitCode.NO_READER))
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, MemoryError):
        detail = f" ({_first_line(error)})" if str(error) else ""
        return Ending(f"out of host memory{detail}", int(ExitCode.FAILED))
    if isinstance(error, (RuntimeError, AssertionError)):
        return _explain_jax_error(error)
    if isinstance(error, ValueError) and (number := _OS_ERROR_CODE.search(str(error))):
        return _explain_os_error(_as_os_error(str(error), int(number[1])))
    if _is_ours(error):
        return Ending(str(error), int(ExitCode.REFUSED))
    return None


def say(message: str, *, name: str) -> None:
    """Prints a message to standard error, prefixed with the command's name."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} …"
    print(f"{started_as(name)}: {printable(message)}", file=sys.stderr, flush=True)


def started_as(name: str) -> str:
    """Returns the name that a command was started under.

    Args:
      name: The command's name where it is started by itself. A command of `peft-jax` has that
        program's name and its own, as `peft-jax train`.
    """
    return sys.argv[0] if sys.argv[0].startswith(f"{PROGRAM} ") else name


def _as_os_error(text: str, number: int) -> OSError:
    """Returns the system error that TensorStore reports in its message's text."""
    file = re.search(r'"(/[^"]+)"', text)
    return OSError(number, os.strerror(number), *([file[1]] if file else []))


def _explain_os_error(error: OSError) -> Ending:
    number = error.errno
    if number is None or error.strerror is None:
        # Raised with only a message, by the project or by a library.
        code = ExitCode.REFUSED if _raised_by_us(error) else ExitCode.FAILED
        return Ending(str(error) or type(error).__name__, int(code))
    files = " to ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
    text = error.strerror if error.strerror[1:2].isupper() else _lowered(error.strerror)
    message = f"{files}: {text}" if files else text
    if number in _HINTS:
        message = f"{message}; {_HINTS[number]}"
    return Ending(message, int(ExitCode.REFUSED if number in _UNUSABLE_PATH else ExitCode.FAILED))


def _explain_jax_error(error: Exception) -> Ending | None:
    """Explains JAX's errors by their text or origin, because they have no classes of their own."""
    text = _first_line(error)
    if isinstance(error, AssertionError):
        # Raised if JAX_PLATFORMS names a known platform whose plug-in is not installed.
        if _module(error) != "jax._src.xla_bridge":
            return None
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return Ending(
            f"JAX finds no devices for JAX_PLATFORMS={platforms}; JAX_PLATFORMS=cpu works"
            " everywhere",
            int(ExitCode.REFUSED),
        )
    if text.startswith("RESOURCE_EXHAUSTED"):
        return Ending(f"out of device memory ({text}); {_LESS_MEMORY}", int(ExitCode.FAILED))
    if text.startswith(("Unable to initialize backend", "Unknown backend")):
        return Ending(f"{text}; JAX_PLATFORMS=cpu works everywhere", int(ExitCode.REFUSED))
    return None


def _is_ours(error: BaseException) -> bool:
    """Returns whether the project's own code, not a library's, raised the error."""
    return (
        isinstance(error, (ValueError, FloatingPointError))
        and not isinstance(error, UnicodeError)
        and _raised_by_us(error)
    )


def _raised_by_us(error: BaseException) -> bool:
    return _module(error).partition(".")[0] in OURS


def _module(error: BaseException) -> str:
    """Returns the module whose code raised an error."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module


def _wants_traceback(*given: object) -> bool:
    """Returns whether the program's or the function's arguments have --traceback."""
    lines = [sys.argv, *(words for words in given if isinstance(words, (list, tuple)))]
    return any("--traceback" in line for line in lines)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _write_any_text() -> None:
    """Escapes characters that the output's encoding lacks, instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Redirects the output, so that Python does not flush into the closed pipe at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        return  # The output is not a file, so nothing is left to flush.
