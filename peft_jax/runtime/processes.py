"""Several processes that train together: how they find each other, and notice when one is gone.

On a pod the same command runs on every host. The processes meet at a coordinator, in the first of
them, and from then on compute in step: what one does not do, the others wait for. So each tells the
others that it is there, every few seconds, through the coordinator; who has not been heard of for a
while, or has said that it ended with an error, ends all of them, with a message that names it.
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
"""A host that is only just started may get its name a little later."""
_PATIENCE_SECONDS = 10.0
"""After so long it is said that the other processes are waited for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """How the processes of one run find each other.

    On TPU pods (Compute Engine and Kubernetes), under SLURM and under Open MPI all is found out.
    Elsewhere the first three are given, here or in the environment as JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Attributes:
      coordinator: "host:port" of the first process, which it listens on and all can reach.
      count: how many processes there are.
      index: which of them this is, from 0.
      contact_timeout: seconds after which a process that is not heard of counts as lost.
      start_timeout: seconds that the processes wait for each other at the start.

    Raises:
      ValueError: they do not fit each other.
    """

    coordinator: str = ""
    count: int | None = None
    index: int | None = None
    contact_timeout: int = 40
    start_timeout: int = 300

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and re.fullmatch(r"[0-9]{1,5}", port)):
            raise ValueError(f"the coordinator must be host:port, but is {self.coordinator!r}")
        if self.coordinator and not 0 < int(port) < 2**16:
            raise ValueError(
                f"the coordinator is {self.coordinator!r}; a port is a number from 1 to 65535"
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"the number of processes must be at least 1, but is {self.count}")
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(
                f"this is said to be process {self.index} of {self.count}; they are counted from 0"
            )
        for name, least in (("contact_timeout", 4), ("start_timeout", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def missing(self) -> list[str]:
        """The flags that nothing has been given for.

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
        """The settings of JAX's variables, and over them those that are given and not None.

        Raises:
          ValueError: a number is none, or they do not fit each other.

        Example:
          >>> ProcessSettings.from_environment({"JAX_NUM_PROCESSES": "4"}, index=2)
          ProcessSettings(coordinator='', count=4, index=2, contact_timeout=40, start_timeout=300)
        """
        found: dict[str, Any] = {"coordinator": environment.get("JAX_COORDINATOR_ADDRESS", "")}
        for name, variable in (("count", "JAX_NUM_PROCESSES"), ("index", "JAX_PROCESS_ID")):
            text = environment.get(variable)
            if text is not None and not text.strip().isdigit():
                raise ValueError(f"{variable} must be a whole number, but is {text!r}")
            found[name] = None if text is None else int(text)
        found |= {name: value for name, value in given.items() if value is not None}
        return ProcessSettings(**found)


def join_processes(settings: ProcessSettings, *, say: Callable[[str], None]) -> "PeerMonitor":
    """Connects this process with the others; nothing of JAX may have been used before.

    Args:
      settings: how they find each other.
      say: told what ended the run, from a thread, right before the process ends.

    Returns:
      The watch that has begun, over this process and the others.

    Raises:
      RefusedError: they do not find each other.
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
            # JAX's own watch kills without a word that names anybody; it comes last.
            heartbeat_timeout_seconds=settings.contact_timeout + _GRACE_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = _first_line(error).rstrip(".")
        if isinstance(error, ValueError) and settings.missing:
            reason = (
                "this is no TPU pod, SLURM or Open MPI job that tells them how, and"
                f" nothing is given for {' and '.join(settings.missing)}"
            )
        raise RefusedError(
            f"the processes did not find each other: {reason}. On TPU pods, SLURM and"
            " Open MPI nothing has to be given; elsewhere give --coordinator=HOST:PORT,"
            " --num_processes and --process_id, and see that the port can be reached from every"
            " host and that all processes are started within"
            f" {settings.start_timeout} seconds"
        ) from error
    finally:
        waiting.cancel()
    from jax._src.distributed import global_state  # the store of the coordinator has no public name

    return PeerMonitor(
        global_state.client,
        count=global_state.num_processes,
        index=global_state.process_id,
        timeout=settings.contact_timeout,
        say=say,
    )


def _resolve(host: str) -> None:
    """Waits until a host's name has an address.

    JAX would try for as long as it waits for the other processes, and not say why.

    Raises:
      RefusedError: the name has no address.
    """
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(re.sub(r"^\[(.*)\]$", r"\1", host), None)
            return
        except (OSError, UnicodeError) as error:
            if isinstance(error, UnicodeError) or time.monotonic() > deadline:
                raise RefusedError(
                    f"the coordinator's host {host!r} cannot be found ({error}): give a name or an"
                    " address of the first process's host that this one can reach, as"
                    " --coordinator=HOST:PORT"
                ) from error
        time.sleep(1.0)


def _waiting(settings: ProcessSettings) -> str:
    """What is said when the others are long in coming."""
    who = "this process" if settings.index is None else f"process {settings.index}"
    of = "" if settings.count is None else f" of {settings.count}"
    where = f" at {settings.coordinator}" if settings.coordinator else ""
    return (
        f"{who}{of} is waiting for the other processes{where}, for {settings.start_timeout} seconds"
        " at most; each has to be started, and with a number of its own"
    )


class PeerMonitor:
    """Watches over the processes of a run, in a thread.

    Args:
      client: of JAX's coordinator.
      count: how many processes there are.
      index: which of them this is.
      timeout: seconds after which one that is not heard of counts as lost.
      say: told why, before the process ends.
      end: ends the process with a code; for tests.
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
        self._thread = threading.Thread(target=self._watch, name="contact", daemon=True)
        self._thread.start()
        if index != 0:
            # A call to a coordinator that hangs does not come back: another thread has to notice.
            watch = threading.Thread(target=self._watch_coordinator, daemon=True)
            watch.start()

    def leave(self, reason: str, code: int) -> NoReturn:
        """Ends this process because of an error, and thereby the others, which are told why."""
        self._leaving.set()
        try:
            self._client.key_value_set(
                f"{_ENDED}{self._index}", f"{code} {self._host} {reason}", allow_overwrite=True
            )
            self._wait_until_seen()
        except Exception as error:
            # The coordinator is gone, or refuses: the others notice that by themselves.
            self._say(f"the other processes could not be told: {_first_line(error)}")
        self._exit(code)

    def _wait_until_seen(self) -> None:
        """Waits until all others have read why one ends: the coordinator goes with the first."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline:
            if len(self._client.key_value_dir_get(_SEEN)) >= self._count - 1:
                return
            time.sleep(0.1)

    def closing(self) -> None:
        """The run ended well: from now on it is no fault if others are gone."""
        self._leaving.set()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process after an unforeseen error; if another process is the cause, says so.

        A process that dies breaks the others' computations off at once, which JAX reports as an
        error of its own, while the silence is only noticed after the timeout. So after such an
        error the watch is given the time to find out; where it finds nobody, the error is shown
        with where it came from.
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
        """Ends this process if another has ended with an error, or is not heard of any more."""
        for key, text in self._client.key_value_dir_get(_ENDED):
            code, host, reason = text.split(" ", 2)
            self._client.key_value_set(f"{_SEEN}{self._index}", "", allow_overwrite=True)
            if self._index == 0:
                self._wait_until_seen()
                time.sleep(1.0)  # in which the one that ends sees that, and is gone
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
            f"lost contact with {who}, for {seconds:.0f} seconds: the processes cannot go on"
            " without each other, so this one ends too. The same command on every host goes on from"
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
    """Whether a computation broke off, rather than that the program asked for something wrong.

    What breaks off while it is started comes as a ValueError, with the status before the text.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
