"""The worker's side of a comparison: makes a step, and runs it when told to.

A worker is a process of its own that speaks lines of JSON. It waits for an empty line
(`await_turn`), says {"ready": true, …} once its step has been compiled and run, then answers each
line "N" on its standard input with the seconds a step took over N steps, and ends when the input
does.
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
    """Answers until the input ends.

    Args:
      step: one training step; returns its loss, having waited for it.
      warm_up: steps not counted.
      device_peak: the most bytes held on the accelerator; None where there is none, and then the
        process's own are reported.
      facts: what to report beside.
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
    """Waits for a line on the standard input.

    Workers import and make their parameters at the same time; what compiles, and may time kernels
    to choose among them, comes after this, one worker after another.
    """
    sys.stdin.readline()


def _say(**answer: object) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
"""The pipe to who asks; what libraries and the compilers they start print is no answer."""
