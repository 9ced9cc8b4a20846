"""Runs programs in the sandbox, and says what came of them."""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, Literal

from peft_jax.runtime.errors import RefusedError

from .limits import SandboxLimits
from .programs import TestedProgram
from .standard_library import files_of
from .usage import memory_of_tree

Verdict = Literal["passed", "failed", "timeout", "memory", "output", "crashed"]
"""What came of a program: it came to its end; it raised, or left before; it took too long, too
much memory, or wrote too much; it was ended by a signal."""

_JAIL = Path(__file__).with_name("jail.py")
_LOOK_EVERY = 0.02
"""Seconds between two looks at the memory that a program takes."""

_START_SECONDS = 60.0
"""How long Python and the jail may take to start, which does not count."""

_STARTED_WORD = b'{"started": true}\n'

_Over = Literal["timeout", "memory", "output"]

_ESCAPES = """
import os, socket
assert os.getpid() != 1 and os.getppid() == 1, "it sees other processes"
assert os.listdir("/tmp") == [], "its folder is not its own"
for folder in ("/", "/usr"):
    try:
        open(os.path.join(folder, "written"), "w")
    except OSError:
        continue
    raise AssertionError(f"it can write to {folder}")
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        continue
    raise AssertionError("it can open a socket")
try:
    socket.socketpair()
except OSError:
    pass
else:
    raise AssertionError("it can open a pair of sockets")
import resource
assert resource.getrlimit(resource.RLIMIT_NPROC)[0] > 0, "its processes are not limited"
"""


class IsolationError(RefusedError):
    """Generated code cannot be kept apart on this machine; the message says why."""


class StoppedError(Exception):
    """A program was ended because its outcome is no longer wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program.

    Attributes:
      verdict: in a word.
      detail: what was raised, which signal ended it, or which limit it went over.
      output: the beginning of what it wrote to the standard output and error.
      seconds: how long it ran.
    """

    verdict: Verdict
    detail: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it came to its end."""
        return self.verdict == "passed"


class Sandbox:
    """Runs programs, each in processes of its own that reach nothing and end with it.

    A program has no network and no socket; a file system of Python's standard library alone,
    read-only, and an empty /tmp; processes of its own only; no privileges, whoever runs this; and
    what `limits` give it. There is no other package that it could import.

    A program by itself passes if it comes to its end, which it reports itself: one that is written
    to cheat can. A `TestedProgram` cannot: its test runs, compares and reports in another process.

    It is kept apart by Linux namespaces (user, mount, process, network, IPC, host name), a filter
    of system calls, and limits of resources. Where those cannot be had, `check` says so, and
    nothing is run unless `isolated` is False: then limits of resources and of time are all there
    is, and a program can read, write and send whatever its user can.

    Args:
      limits: what a program may take.
      isolated: whether programs are kept apart.

    Example:
      >>> sandbox = Sandbox(SandboxLimits(seconds=2.0), isolated=False)
      >>> sandbox.run("assert 1 + 1 == 3").verdict
      'failed'
      >>> source, test = "def add(a, b): return a + b", "assert add(1, 1) == 2"
      >>> sandbox.run(TestedProgram(source=source, function="add", test=test)).verdict
      'passed'
    """

    def __init__(self, limits: SandboxLimits | None = None, *, isolated: bool = True):
        self._limits = limits or SandboxLimits()
        self._isolated = isolated

    def check(self) -> None:
        """Runs a program that tries to get out.

        Raises:
          IsolationError: programs cannot be kept apart here, or it got out.
        """
        if not self._isolated:
            return
        outcome = self.run(_ESCAPES)
        if not outcome.passed:
            raise IsolationError(
                f"generated code cannot be kept apart here: {outcome.detail or outcome.verdict}"
            )

    def run(self, program: str | TestedProgram, *, stop: threading.Event | None = None) -> Outcome:
        """Runs one program to its end or to the end of its limits.

        Args:
          program: Python source, or a program with a test.
          stop: ends it when set.

        Raises:
          IsolationError: it cannot be kept apart; it has not been run.
          StoppedError: it was ended by `stop`.
        """
        if self._isolated and not sys.platform.startswith("linux"):
            raise IsolationError(f"programs can be kept apart on Linux only, not on {sys.platform}")
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            # An unprivileged user of the jail has to pass through.
            os.chmod(folder, 0o755)
            return self._run(program, folder, stop or threading.Event())

    def _run(self, program: str | TestedProgram, folder: str, stop: threading.Event) -> Outcome:
        token = secrets.token_hex(16)
        settings = self._settings(folder)
        readable, writable = os.pipe()
        settings["result"] = writable
        with open(readable, "rb", buffering=0) as result, contextlib.ExitStack() as files:
            passed = [writable]
            if isinstance(program, TestedProgram):
                test = files.enter_context(tempfile.TemporaryFile())
                _write_test(test, program, token)
                settings |= {"test": test.fileno(), "function": program.function}
                passed.append(test.fileno())
                program = program.source
            else:
                settings["token"] = token
            try:
                process = subprocess.Popen(
                    [_interpreter(), "-I", "-S", "-B", str(_JAIL)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=passed,
                    start_new_session=True,
                    cwd="/",
                    env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
                )
            finally:
                os.close(writable)
            try:
                _feed(process, json.dumps(settings), program)
                watch = _Watch(process, result, self._limits)
                watch.until_end(stop)
            finally:
                _end(process)
        return self._judge(watch, token, process.returncode)

    def _settings(self, folder: str) -> dict[str, Any]:
        limits = self._limits
        try:
            needed = files_of(_interpreter()) if self._isolated else {"folders": [], "files": []}
        except OSError as error:
            raise IsolationError(f"generated code cannot be kept apart here: {error}") from error
        return {
            "isolated": self._isolated,
            "folder": folder,
            **needed,
            "test": None,
            "parent": os.getpid(),
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mib << 20,
            "file_bytes": limits.file_mib << 20,
            "processes": limits.processes,
        }

    def _judge(self, watch: "_Watch", token: str, returncode: int) -> Outcome:
        """The outcome, from what was seen and what the jail has said."""
        said = watch.said
        if not watch.started:
            why = said.get("not_isolated") or (
                "the jail was not built: " + watch.output.decode("utf-8", "replace")[-300:].strip()
            )
            raise IsolationError(f"generated code cannot be kept apart here: {why}")
        # Whatever the program has said in the jail's name may be of any kind.
        name = _signal_name(-returncode if returncode < 0 else said.get("signal"))
        over = "timeout" if name == "SIGXCPU" else watch.over
        verdict: Verdict
        if over is not None:
            verdict, detail = over, self._limit_in_words(over)
        elif said.get("token") == token and returncode == 0:
            verdict, detail = "passed", ""
        elif "error" in said:
            verdict, detail = "failed", _writable(said["error"])
        elif name:
            verdict, detail = "crashed", name
        else:
            verdict, detail = "failed", "it left before its end"
        most = self._limits.output_kib << 10
        output = bytes(watch.output[:most]).decode("utf-8", "replace")
        return Outcome(verdict=verdict, detail=detail, output=output, seconds=watch.seconds)

    def _limit_in_words(self, verdict: "_Over") -> str:
        limits = self._limits
        return {
            "timeout": f"over {limits.seconds:g} s",
            "memory": f"over {limits.memory_mib} MiB of memory",
            "output": f"over {limits.output_kib} KiB of output",
        }[verdict]


class _Watch:
    """Looks after a process until it ends or goes over a limit.

    Attributes:
      over: the limit it went over; None if none.
      output: what it wrote.
      said: the last thing that the jail said.
      started: whether the program was begun: what the jail says after that, the program may have
        said in its name.
      seconds: how long the program ran.
    """

    def __init__(self, process: subprocess.Popen, result: io.RawIOBase, limits: SandboxLimits):
        assert process.stdout is not None
        self.over: _Over | None = None
        self.output = bytearray()
        self._process = process
        self._limits = limits
        self._words = bytearray()
        self._sinks = {process.stdout.fileno(): self.output, result.fileno(): self._words}
        self._since = time.monotonic()
        self.started = False

    @property
    def said(self) -> dict[str, Any]:
        return _last_word(bytes(self._words))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def until_end(self, stop: threading.Event) -> None:
        """Waits; raises `StoppedError` when `stop` is set before the end."""
        with selectors.DefaultSelector() as selector:
            for descriptor in self._sinks:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            ended = False
            while self.over is None and not ended:
                if stop.is_set():
                    raise StoppedError
                # What was written before the end is read after it.
                ended = self._process.poll() is not None
                self._read(selector, wait=not ended)
                self.over = self._find_over()

    def _read(self, selector: selectors.BaseSelector, *, wait: bool) -> None:
        if not selector.get_map():
            time.sleep(_LOOK_EVERY if wait else 0)
            return
        for key, _ in selector.select(_LOOK_EVERY if wait else 0):
            piece = os.read(key.fd, 1 << 16)
            self._sinks[key.fd] += piece
            if not piece:
                selector.unregister(key.fd)
        if not self.started and self._words.startswith(_STARTED_WORD):
            # The time that Python and the jail take to start does not count.
            self.started, self._since = True, time.monotonic()

    def _find_over(self) -> "_Over | None":
        limits = self._limits
        if len(self.output) + len(self._words) > limits.output_kib << 10:
            return "output"
        if self.seconds > (limits.seconds if self.started else _START_SECONDS):
            return "timeout"
        if memory_of_tree(self._process.pid) > limits.memory_mib << 20:
            return "memory"
        return None


def _interpreter() -> str:
    """The interpreter outside of any virtual environment, which the jail knows nothing of."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _write_test(file: IO[bytes], program: TestedProgram, token: str) -> None:
    """Writes what the test's process reads, and leaves the file at its beginning."""
    text = json.dumps({"token": token, "given": program.given, "test": program.test})
    file.write(text.encode())
    file.seek(0)


def _feed(process: subprocess.Popen, settings: str, program: str) -> None:
    """Hands over settings and program; the jail reads all of it before it runs any."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(settings.encode() + b"\n")
        process.stdin.write(program.encode("utf-8", "surrogatepass"))
        process.stdin.close()


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all that came of it: with the first one the kernel ends the rest."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _last_word(words: bytes) -> dict[str, Any]:
    """The last line of JSON; nothing if there is none."""
    for line in reversed(words.splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(line)
            if isinstance(said, dict):
                return said
    return {}


def _signal_name(number: Any) -> str:
    """The name of a signal; empty for what is none."""
    if type(number) is not int or not 0 < number < signal.NSIG:
        return ""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # A real-time signal, most of which have no names.


def _writable(detail: Any) -> str:
    r"""What was raised, with halves of characters, which no file can hold, in escapes.

    Example:
      >>> _writable("ValueError: \ud83d")
      'ValueError: \\ud83d'
    """
    if not isinstance(detail, str):
        return "no valid result"
    return detail.encode("utf-8", "backslashreplace").decode()
