r"""How a command ends: its exit codes, and one message in place of a traceback.

Every command of the project is a function under `command`, which is the one place where what ends
it is caught. What is caught is what the project says itself, and what the machine refuses:

- errors of the classes that derive from `EndingError`, such as `RefusedError`;
- a `ValueError` or `FloatingPointError` that the project's own code raises;
- the system's errors: a file that is not there, a full disk, a read-only folder, a lost connection;
- memory that does not suffice, a back end of JAX that is not there;
- Ctrl-C, and a reader of the output that went away.

Anything else is a fault of the program: it ends with its traceback and exit code 1. So does a
`ValueError` out of a library. With --traceback the others show theirs too, before the message.
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

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a command ends because of an error.

    Attributes:
      message: for its user; empty if there is nobody to read it.
      code: the exit code.
    """

    message: str
    code: int


OURS = ("peft_jax", "eval", "kernels_pallas", "configs", "examples", "__main__")
"""The packages whose own errors are messages to the user."""

_LONGEST_MESSAGE = 4000

_OS_ERROR_CODE = re.compile(r"\[os_error_code='(\d+)'")

# Where nothing was begun: the path is not one that the command can work with.
_UNUSABLE_PATH = MappingProxyType(
    {
        errno.ENOENT: "give a path that exists",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EISDIR: "give a file",
        errno.EEXIST: "give another path",
        errno.EACCES: "give a path that this user may use",
        errno.EPERM: "give a path that this user may use",
        errno.EROFS: "give a folder that can be written to",
        errno.ELOOP: "the link leads back to itself",
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
    """Makes a function a command, which returns its exit code whatever ends it.

    Args:
      name: the command's name, which messages begin with.
      stopped: the message after Ctrl-C.

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
    """How a command ends because of an error; None if the error is a fault of the program.

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
        said = f" ({_first_line(error)})" if str(error) else ""
        return Ending(f"this machine's memory does not suffice{said}", int(ExitCode.FAILED))
    if isinstance(error, (RuntimeError, AssertionError)):
        return _explain_jax_error(error)
    if isinstance(error, ValueError) and (number := _OS_ERROR_CODE.search(str(error))):
        return _explain_os_error(_as_os_error(str(error), int(number[1])))
    if _is_ours(error):
        return Ending(str(error), int(ExitCode.REFUSED))
    return None


def say(message: str, *, name: str) -> None:
    """Tells the user, in a command's name, on the standard error."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} …"
    print(f"{name}: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns a text in which only what can be seen is left as it is.

    A row's, a model's or an endpoint's words can hold sequences that move a terminal's cursor, hide
    text or turn its direction around. Such characters are written as Python's escapes.

    Args:
      text: The text.
      keep: Characters that are left as they are all the same.

    Example:
      >>> print(printable("a\x1b[2Jb\n\u202ec é", keep=""))
      a\x1b[2Jb\n\u202ec é
    """
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _as_os_error(text: str, number: int) -> OSError:
    """TensorStore's errors, also of checkpoints, have the system's error in their text."""
    file = re.search(r'"(/[^"]+)"', text)
    return OSError(number, os.strerror(number), *([file[1]] if file else []))


def _explain_os_error(error: OSError) -> Ending:
    number = error.errno
    if number is None or error.strerror is None:
        # Raised with a message, by the project or by a library.
        code = ExitCode.REFUSED if _raised_by_us(error) else ExitCode.FAILED
        return Ending(str(error) or type(error).__name__, int(code))
    files = " to ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
    text = error.strerror if error.strerror[1:2].isupper() else _lowered(error.strerror)
    message = f"{files}: {text}" if files else text
    if number in _HINTS:
        message = f"{message}; {_HINTS[number]}"
    return Ending(message, int(ExitCode.REFUSED if number in _UNUSABLE_PATH else ExitCode.FAILED))


def _explain_jax_error(error: Exception) -> Ending | None:
    """JAX has no classes for what the machine lacks; it is in the text, or in the place."""
    text = _first_line(error)
    if isinstance(error, AssertionError):
        # So it ends where JAX_PLATFORMS names a known platform whose plug-in is not installed.
        if _module(error) != "jax._src.xla_bridge":
            return None
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return Ending(
            f"JAX finds no devices of JAX_PLATFORMS={platforms}; cpu works everywhere",
            int(ExitCode.REFUSED),
        )
    if text.startswith("RESOURCE_EXHAUSTED"):
        return Ending(f"the devices' memory does not suffice ({text})", int(ExitCode.FAILED))
    if text.startswith(("Unable to initialize backend", "Unknown backend")):
        return Ending(f"{text}; JAX_PLATFORMS=cpu works everywhere", int(ExitCode.REFUSED))
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether the project refuses something with the error, rather than a library."""
    return (
        isinstance(error, (ValueError, FloatingPointError))
        and not isinstance(error, UnicodeError)
        and _raised_by_us(error)
    )


def _raised_by_us(error: BaseException) -> bool:
    return _module(error).partition(".")[0] in OURS


def _module(error: BaseException) -> str:
    """The module whose code raised an error."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module


def _wants_traceback(*given: object) -> bool:
    """Whether the program's arguments, or those that are given to the function, ask for it."""
    lines = [sys.argv, *(words for words in given if isinstance(words, (list, tuple)))]
    return any("--traceback" in line for line in lines)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _write_any_text() -> None:
    """Lets the output show what its encoding lacks in escapes, where it would end the program."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Keeps Python from trying once more, at its end, to write what nobody reads."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        return  # The output is no file: nothing is left to be written.
