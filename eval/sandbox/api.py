"""Runs programs in the sandbox, and reports their outcomes."""

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
"""Outcome of a program: "passed" if it completed, "failed" if it raised or exited early, the limit
that it exceeded, or "crashed" if a signal killed it."""

_JAIL = Path(__file__).with_name("jail.py")
_POLL_SECONDS = 0.02
"""Interval at which the memory of a program is measured."""

_START_SECONDS = 60.0
"""Time limit for Python and the jail to start, which is not part of the program's time."""

_STARTED_REPORT = b'{"started": true}\n'

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
    """Raised when generated code cannot be isolated on this machine."""


class StoppedError(Exception):
    """Raised when a program was stopped because its outcome is no longer needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a program.

    Attributes:
      verdict: How the program ended.
      detail: Error that it raised, signal that killed it, or limit that it exceeded.
      output: Beginning of its standard output and error.
      seconds: Run time.
    """

    verdict: Verdict
    detail: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Returns whether the program completed."""
        return self.verdict == "passed"


class Sandbox:
    """Runs each program in its own isolated processes, which end with it.

    A program has no network and no sockets. Its file system holds only Python's standard library,
    read-only, and an empty /tmp. It sees only its own processes, has no privileges, and is subject
    to `limits`. It can import no other package.

    A plain program reports its own completion, so that a malicious one can fake it. A
    `TestedProgram` cannot, because its test runs, compares and reports in another process.

    Isolation uses Linux namespaces (user, mount, process, network, IPC, host name), a filter of
    system calls, and resource limits. If they are unavailable, `check` raises an error and no
    program runs. With `isolated=False` there are only resource and time limits, and a program can
    read, write and send whatever its user can.

    Args:
      limits: Resource limits of a program.
      isolated: Whether programs are isolated.

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
        """Checks the isolation with a program that tries to escape.

        Raises:
          IsolationError: Programs cannot be isolated here, or the program escaped.
        """
        if not self._isolated:
            return
        outcome = self.run(_ESCAPES)
        if not outcome.passed:
            raise IsolationError(
                f"generated code cannot be isolated here: {outcome.detail or outcome.verdict}"
            )

    def run(self, program: str | TestedProgram, *, stop: threading.Event | None = None) -> Outcome:
        """Runs one program until it ends or exceeds a limit.

        Args:
          program: Python source, or a program with a test.
          stop: Ends the program when set.

        Raises:
          IsolationError: The program cannot be isolated, and was not run.
          StoppedError: The program was ended by `stop`.
        """
        if self._isolated and not sys.platform.startswith("linux"):
            raise IsolationError(f"programs can be isolated only on Linux, not on {sys.platform}")
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            # The jail's unprivileged user must be able to enter the folder.
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
                monitor = _ProcessMonitor(process, result, self._limits)
                monitor.wait(stop)
            finally:
                _end(process)
        return self._outcome(monitor, token, process.returncode)

    def _settings(self, folder: str) -> dict[str, Any]:
        limits = self._limits
        try:
            needed = files_of(_interpreter()) if self._isolated else {"folders": [], "files": []}
        except OSError as error:
            raise IsolationError(f"generated code cannot be isolated here: {error}") from error
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

    def _outcome(self, monitor: "_ProcessMonitor", token: str, returncode: int) -> Outcome:
        """Derives the outcome from the jail's last report and the exit code."""
        said = monitor.report
        if not monitor.started:
            why = said.get("not_isolated") or (
                "the jail failed to start: "
                + monitor.output.decode("utf-8", "replace")[-300:].strip()
            )
            raise IsolationError(f"generated code cannot be isolated here: {why}")
        # The program may have forged the report, so its values may have any type.
        name = _signal_name(-returncode if returncode < 0 else said.get("signal"))
        over = "timeout" if name == "SIGXCPU" else monitor.over
        verdict: Verdict
        if over is not None:
            verdict, detail = over, self._describe_limit(over)
        elif said.get("token") == token and returncode == 0:
            verdict, detail = "passed", ""
        elif "error" in said:
            verdict, detail = "failed", _writable(said["error"])
        elif name:
            verdict, detail = "crashed", name
        else:
            verdict, detail = "failed", "it exited before its end"
        limit = self._limits.output_kib << 10
        output = bytes(monitor.output[:limit]).decode("utf-8", "replace")
        return Outcome(verdict=verdict, detail=detail, output=output, seconds=monitor.seconds)

    def _describe_limit(self, verdict: "_Over") -> str:
        limits = self._limits
        return {
            "timeout": f"over {limits.seconds:g} s",
            "memory": f"over {limits.memory_mib} MiB of memory",
            "output": f"over {limits.output_kib} KiB of output",
        }[verdict]


class _ProcessMonitor:
    """Monitors a process until it ends or exceeds a limit.

    Attributes:
      over: Limit that it exceeded; None if none.
      output: Output of the process.
      report: Last report of the jail.
      started: Whether the program has started. The program may forge later reports.
      seconds: Run time of the program.
    """

    def __init__(self, process: subprocess.Popen, result: io.RawIOBase, limits: SandboxLimits):
        assert process.stdout is not None
        self.over: _Over | None = None
        self.output = bytearray()
        self._process = process
        self._limits = limits
        self._reports = bytearray()
        self._sinks = {process.stdout.fileno(): self.output, result.fileno(): self._reports}
        self._since = time.monotonic()
        self.started = False

    @property
    def report(self) -> dict[str, Any]:
        return _last_report(bytes(self._reports))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def wait(self, stop: threading.Event) -> None:
        """Waits for the process; raises `StoppedError` if `stop` is set before its end."""
        with selectors.DefaultSelector() as selector:
            for descriptor in self._sinks:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            ended = False
            while self.over is None and not ended:
                if stop.is_set():
                    raise StoppedError
                # Output from just before the end is read after it.
                ended = self._process.poll() is not None
                self._read(selector, wait=not ended)
                self.over = self._find_over()

    def _read(self, selector: selectors.BaseSelector, *, wait: bool) -> None:
        if not selector.get_map():
            time.sleep(_POLL_SECONDS if wait else 0)
            return
        for key, _ in selector.select(_POLL_SECONDS if wait else 0):
            piece = os.read(key.fd, 1 << 16)
            self._sinks[key.fd] += piece
            if not piece:
                selector.unregister(key.fd)
        if not self.started and self._reports.startswith(_STARTED_REPORT):
            # The start of Python and the jail is not part of the program's time.
            self.started, self._since = True, time.monotonic()

    def _find_over(self) -> "_Over | None":
        limits = self._limits
        if len(self.output) + len(self._reports) > limits.output_kib << 10:
            return "output"
        if self.seconds > (limits.seconds if self.started else _START_SECONDS):
            return "timeout"
        if memory_of_tree(self._process.pid) > limits.memory_mib << 20:
            return "memory"
        return None


def _interpreter() -> str:
    """Returns the interpreter outside virtual environments, which the jail does not contain."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _write_test(file: IO[bytes], program: TestedProgram, token: str) -> None:
    """Writes the input of the test's process, and rewinds the file."""
    text = json.dumps({"token": token, "given": program.given, "test": program.test})
    file.write(text.encode())
    file.seek(0)


def _feed(process: subprocess.Popen, settings: str, program: str) -> None:
    """Sends the settings and the program; the jail reads all of it before it runs the program."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(settings.encode() + b"\n")
        process.stdin.write(program.encode("utf-8", "surrogatepass"))
        process.stdin.close()


def _end(process: subprocess.Popen) -> None:
    """Kills the process; the kernel then kills its descendants."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _last_report(reports: bytes) -> dict[str, Any]:
    """Returns the last line that is a JSON object; an empty one if there is none."""
    for line in reversed(reports.splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(line)
            if isinstance(said, dict):
                return said
    return {}


def _signal_name(number: Any) -> str:
    """Returns the name of a signal; empty for other values."""
    if type(number) is not int or not 0 < number < signal.NSIG:
        return ""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # A real-time signal, most of which have no names.


def _writable(detail: Any) -> str:
    r"""Returns the raised error with lone surrogates escaped, because UTF-8 cannot encode them.

    Example:
      >>> _writable("ValueError: \ud83d")
      'ValueError: \\ud83d'
    """
    if not isinstance(detail, str):
        return "no valid result"
    return detail.encode("utf-8", "backslashreplace").decode()
