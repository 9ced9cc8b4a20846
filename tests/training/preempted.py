"""Sends this process a SIGTERM after a step of its run; import it with `--import=preempted`.

The step is `PREEMPTED_AFTER`, and the process is the last one. JAX looks for the signal once a
second, so from then on the process sleeps before each step, and the others wait for it. A signal
from outside would race with a run of few, short steps.
"""

import os
import signal
import time

import jax

from peft_jax.runtime.interruption import Interruption

_requested = Interruption.requested


def _request_after_notice(self: Interruption, step: int) -> bool:
    after = int(os.environ["PREEMPTED_AFTER"])
    if step >= after and jax.process_index() == jax.process_count() - 1:
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    return _requested(self, step)


if "PREEMPTED_AFTER" in os.environ:  # and not where tests are collected
    Interruption.requested = _request_after_notice
