"""Connects the processes of a multi-host run, and ends all of them if one fails.

On a pod the same command runs on every host. The processes connect to a coordinator in the first
process. From then on they compute in lockstep: if one stops, the others hang. So each process sends
a heartbeat through the coordinator every few seconds. If a process misses its heartbeats or reports
an error, all others end with a message that names it.
"""

import dataclasses
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from peft_jax.runtime.errors import ExitCode, RefusedError

_BEAT = "peft_jax/beat/"
_ENDED = "peft_jax/ended/"
_SEEN = "peft_jax/seen/"
_FAREWELL_SECONDS = 10.0
_GRACE_SECONDS = 15
_RESOLVE_SECONDS = 20.0
"""Time limit for resolving the coordinator's name: a new host may get its name a little later."""
_PATIENCE_SECONDS = 10.0
"""Delay before a process says that it is waiting for the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Settings that let the processes of one run find each other.

    On TPU pods (Compute Engine and Kubernetes), under SLURM and under Open MPI, JAX detects the
    first three. Elsewhere give them here, or in the environment as JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Attributes:
      coordinator: "host:port" on which the first process listens and which all can reach.
      count: Number of processes.
      index: Index of this process, from 0.
      contact_timeout: Seconds without a heartbeat after which a process counts as lost.
      start_timeout: Seconds that the processes wait for each other at the start.

    Raises:
      ValueError: A setting is invalid, or the settings contradict each other.
    """

    coordinator: str = ""
    count: int | None = None
    index: int | None = None
    contact_timeout: int = 40
    start_timeout: int = 300

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and re.fullmatch(r"[0-9]{1,5}", port)):
            raise ValueError(f"coordinator must be host:port, but is {self.coordinator!r}")
        if self.coordinator and not 0 < int(port) < 2**16:
            raise ValueError(
                f"coordinator is {self.coordinator!r}, but a port is a number from 1 to 65535"
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"num_processes must be at least 1, but is {self.count}")
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(
                f"process_id must be from 0 to num_processes - 1, but is {self.index} of"
                f" {self.count}"
            )
        for name, least in (("contact_timeout", 4), ("start_timeout", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}")

    @property
    def missing(self) -> list[str]:
        """Flags whose settings are not given.

        Example:
          >>> ProcessSettings(count=2, index=0).missing
          ['--coordinator']
        """
        given = {
            "--coordinator": self.coordinator or None,
            "--num_processes": self.count,
            "--process_id": self.index,
        }
        return [flag for flag, value in given.items() if value is None]

    @staticmethod
    def from_environment(
        environment: Mapping[str, str] = os.environ, **given: Any
    ) -> "ProcessSettings":
        """Builds settings from JAX's environment variables, overridden by `given`.

        Args:
          environment: Environment variables.
          **given: Settings by name; those that are None are ignored.

        Raises:
          ValueError: A variable is not an integer, or the settings contradict each other.

        Example:
          >>> ProcessSettings.from_environment({"JAX_NUM_PROCESSES": "4"}, index=2)
          ProcessSettings(coordinator='', count=4, index=2, contact_timeout=40, start_timeout=300)
        """
        found: dict[str, Any] = {"coordinator": environment.get("JAX_COORDINATOR_ADDRESS", "")}
        for name, variable in (("count", "JAX_NUM_PROCESSES"), ("index", "JAX_PROCESS_ID")):
            text = environment.get(variable)
            if text is not None and not text.strip().isdigit():
                raise ValueError(f"{variable} must be an integer, but is {text!r}")
            found[name] = None if text is None else int(text)
        found |= {name: value for name, value in given.items() if value is not None}
        return ProcessSettings(**found)


def join_processes(settings: ProcessSettings, *, say: Callable[[str], None]) -> "PeerMonitor":
    """Connects this process to the others; call it before JAX uses a device.

    Args:
      settings: Settings of the connection.
      say: Prints a message. A thread calls it with the reason right before the process ends.

    Returns:
      The running monitor of the run's processes.

    Raises:
      RefusedError: The processes do not find each other.
    """
    if settings.coordinator:
        _resolve(settings.coordinator.rpartition(":")[0])
    waiting = threading.Timer(_PATIENCE_SECONDS, say, [_waiting(settings)])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address=settings.coordinator or None,
            num_processes=settings.count,
            process_id=settings.index,
            initialization_timeout=settings.start_timeout,
            # JAX's own heartbeat kills without naming the lost process, so it must come last. Its
            # calls to the coordinator already fail after half of this time.
            heartbeat_timeout_seconds=2 * (settings.contact_timeout + _GRACE_SECONDS),
        )
    except (ValueError, RuntimeError) as error:
        reason = _first_line(error).rstrip(".")
        if isinstance(error, ValueError) and settings.missing:
            reason = (
                f"{' and '.join(settings.missing)} must be given, because no TPU pod, SLURM or"
                " Open MPI job was detected"
            )
        raise RefusedError(
            f"the processes did not find each other: {reason}. TPU pods, SLURM and Open MPI need no"
            " flags. Elsewhere give --coordinator=HOST:PORT, --num_processes and --process_id. Make"
            " sure that every host can reach the port, and that all processes start within"
            f" {settings.start_timeout} seconds"
        ) from error
    finally:
        waiting.cancel()
    from jax._src.distributed import global_state  # the coordinator's store has no public name

    return PeerMonitor(
        global_state.client,
        count=global_state.num_processes,
        index=global_state.process_id,
        timeout=settings.contact_timeout,
        say=say,
    )


def _resolve(host: str) -> None:
    """Waits until a host's name resolves to an address.

    JAX would retry for the whole start timeout without saying why.

    Raises:
      RefusedError: The name does not resolve.
    """
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(re.sub(r"^\[(.*)\]$", r"\1", host), None)
            return
        except (OSError, UnicodeError) as error:
            if isinstance(error, UnicodeError) or time.monotonic() > deadline:
                raise RefusedError(
                    f"the coordinator's host {host!r} cannot be resolved ({error}): give the name"
                    " or address of the first process's host as --coordinator=HOST:PORT"
                ) from error
        time.sleep(1.0)


def _waiting(settings: ProcessSettings) -> str:
    """Returns the message for a process whose peers are slow to connect."""
    who = "this process" if settings.index is None else f"process {settings.index}"
    of = "" if settings.count is None else f" of {settings.count}"
    where = f" at {settings.coordinator}" if settings.coordinator else ""
    return (
        f"{who}{of} is waiting up to {settings.start_timeout} seconds for the other"
        f" processes{where}; start each with a --process_id of its own"
    )


class PeerMonitor:
    """Sends heartbeats and monitors those of the run's other processes, in a thread.

    Args:
      client: Client of JAX's coordinator.
      count: Number of processes.
      index: Index of this process.
      timeout: Seconds without a heartbeat after which a process counts as lost.
      say: Prints the reason before the process ends.
      end: Ends the process with an exit code; replaced in tests.
    """

    def __init__(
        self,
        client: Any,
        *,
        count: int,
        index: int,
        timeout: float,
        say: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
    ):
        self._client = client
        self._count = count
        self._index = index
        self._timeout = timeout
        self._say = say
        self._end = end
        self._host = socket.gethostname()
        self._leaving = threading.Event()
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._answered = time.monotonic()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="peer monitor", daemon=True)
        self._thread.start()
        if index != 0:
            # A call to a hanging coordinator never returns, so a second thread must notice it.
            watch = threading.Thread(target=self._watch_coordinator, daemon=True)
            watch.start()

    def leave(self, reason: str, code: int) -> NoReturn:
        """Ends this process because of an error, and tells the others to end and why."""
        self._leaving.set()
        try:
            self._client.key_value_set(
                f"{_ENDED}{self._index}", f"{code} {self._host} {reason}", allow_overwrite=True
            )
            self._wait_until_seen()
        except Exception as error:
            # The coordinator is gone or rejects the call. The others notice that themselves.
            self._say(f"could not notify the other processes: {_first_line(error)}")
        self._exit(code)

    def _wait_until_seen(self) -> None:
        """Waits until all others have read the reason, because process 0 is the coordinator."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline:
            if len(self._client.key_value_dir_get(_SEEN)) >= self._count - 1:
                return
            time.sleep(0.1)

    def closing(self) -> None:
        """Stops monitoring because the run ended well, so that other processes may exit."""
        self._leaving.set()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process after an unexpected error, and names the process at fault.

        A dying process breaks the others' collectives at once, which JAX reports as an error of
        its own. Its missing heartbeat is only noticed after the timeout. So after such an error
        this waits for the monitor to find the cause. If it finds none, the traceback is printed.
        """
        if _of_the_devices(error):
            self._thread.join(self._timeout + 2 * self._pause)
        if not self._leaving.is_set():
            traceback.print_exception(error)
        self.leave(_first_line(error), 1)

    @property
    def _pause(self) -> float:
        return self._timeout / 8

    def _watch(self) -> None:
        while not self._leaving.wait(self._pause):
            try:
                self._beat()
                self._look()
                self._answered = time.monotonic()
            except Exception as error:
                if not self._leaving.is_set():
                    self._no_answer(error)

    def _beat(self) -> None:
        self._beats += 1
        self._client.key_value_set(
            f"{_BEAT}{self._index}", f"{self._beats} {self._host}", allow_overwrite=True
        )

    def _look(self) -> None:
        """Ends this process if another has reported an error or missed its heartbeats."""
        for key, text in self._client.key_value_dir_get(_ENDED):
            code, host, reason = text.split(" ", 2)
            self._client.key_value_set(f"{_SEEN}{self._index}", "", allow_overwrite=True)
            if self._index == 0:
                self._wait_until_seen()
                time.sleep(1.0)  # lets the failing process see this before the coordinator exits
            self._stop(
                f"process {key.rpartition('/')[2]} of {self._count}, on {host}, ended: {reason}",
                int(code),
            )
        now = time.monotonic()
        for key, text in self._client.key_value_dir_get(_BEAT):
            process = int(key.rpartition("/")[2])
            if self._heard.get(process, ("", 0.0))[0] != text:
                self._heard[process] = (text, now)
        for process, (text, since) in self._heard.items():
            if process != self._index and now - since > self._timeout:
                host = text.partition(" ")[2]
                self._lost(f"process {process} of {self._count}, on {host}", now - since)

    def _no_answer(self, error: Exception) -> None:
        silent = time.monotonic() - self._answered
        if silent > self._timeout / 2:
            self._say(_first_line(error))
            self._lost(f"process 0 of {self._count}, the coordinator", silent)

    def _watch_coordinator(self) -> None:
        while not self._leaving.wait(self._pause):
            silent = time.monotonic() - self._answered
            if silent > self._timeout:
                self._lost(f"process 0 of {self._count}, the coordinator", silent)

    def _lost(self, who: str, seconds: float) -> None:
        self._stop(
            f"lost contact with {who}, for {seconds:.0f} seconds: no process can continue without"
            " the others, so this one ends too. Run the same command on every host to resume from"
            " the last checkpoint",
            ExitCode.LOST_CONTACT,
        )

    def _stop(self, message: str, code: int) -> None:
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._say(message)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._end(code)
        raise SystemExit(code)


def _of_the_devices(error: BaseException) -> bool:
    """Returns whether a computation was aborted, rather than called with wrong arguments.

    JAX raises a ValueError with a status prefix if the abort happens during dispatch.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
