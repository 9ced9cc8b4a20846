"""Signals that ask a run to stop: a preempted machine's SIGTERM, or Ctrl-C."""

import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

from peft_jax.runtime.errors import InterruptedRunError


class Interruption:
    """Notes the first SIGTERM or SIGINT, so that the run can save and leave at its next step.

    A second SIGINT is not noted but raised as `KeyboardInterrupt`, for who cannot wait. Where
    several processes train together, all of them have to leave at the same step: there SIGTERM is
    left to JAX's own preemption notice, which reaches every process, and `requested` asks that; a
    SIGINT is passed on as a SIGTERM.

    Use it as a context; the handlers that stood before come back at its end. Outside the main
    thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether every process is to stop now, at `step`; the same answer in all of them."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received is not None

    def requested_between_steps(self) -> bool:
        """Whether work between two steps (an evaluation, say) may be abandoned at once.

        Always false where several processes train together: they could not agree on when.
        """
        return jax.process_count() == 1 and self._received is not None

    def error(self, message: str) -> InterruptedRunError:
        """The exception to leave with."""
        number = self._received if self._received is not None else signal.SIGTERM
        return InterruptedRunError(message, signal_number=number)
