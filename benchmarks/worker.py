"""Implements the worker's side of a comparison: runs a step on request.

A worker is a separate process that writes lines of JSON. It waits for an empty line (`await_turn`)
and writes {"ready": true, …} once its step has been compiled and run. It answers each line "N" of
standard input with the mean seconds of N steps, and ends with its input.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def serve(
    step: Callable[[], float],
    *,
    warm_up: int = 2,
    device_peak: Callable[[], int | None] = lambda: None,
    **facts: object,
) -> None:
    """Answers requests until the input ends.

    Args:
      step: Runs one training step and returns its loss.
      warm_up: Number of steps that are not timed.
      device_peak: Returns the peak memory of the accelerator in bytes; None without one, for which
        the process's peak is reported.
      **facts: Facts to report once.
    """
    losses = [step() for _ in range(warm_up)]
    _say(ready=True, first_loss=losses[0], **facts)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        for _ in range(count):
            loss = step()
        seconds = (time.perf_counter() - start) / count
        peak = device_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _say(seconds=seconds, loss=loss, peak_bytes=peak)


def await_turn() -> None:
    """Waits for a line on standard input.

    Workers import and initialize at the same time. They compile, which may time kernels to choose
    among them, one after another.
    """
    sys.stdin.readline()


def _say(**answer: object) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
"""Pipe for answers, which libraries and compilers do not print to."""
