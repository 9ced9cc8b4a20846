"""Handles signals that ask a run to stop: a preempted machine's SIGTERM, or Ctrl-C."""

import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

from peft_jax.runtime.errors import InterruptedRunError


class Interruption:
    """Records the first SIGTERM or SIGINT, so that the run can save and stop at its next step.

    A second SIGINT raises `KeyboardInterrupt`, for users who cannot wait. In a multi-process run
    all processes must stop at the same step. There, JAX's preemption notice handles SIGTERM and
    reaches every process, and `requested` queries it. A SIGINT is forwarded as a SIGTERM.

    Use it as a context manager; it restores the previous handlers at its end. Outside the main
    thread it records nothing, because Python allows no handlers there.
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
        """Returns whether every process must stop at `step`; all processes agree."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received is not None

    def requested_between_steps(self) -> bool:
        """Returns whether work between two steps, such as an evaluation, may stop at once.

        Always false in a multi-process run, whose processes could not agree on when to stop.
        """
        return jax.process_count() == 1 and self._received is not None

    def error(self, message: str) -> InterruptedRunError:
        """Returns the exception that ends the run."""
        number = self._received if self._received is not None else signal.SIGTERM
        return InterruptedRunError(message, signal_number=number)
