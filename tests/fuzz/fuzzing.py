"""Shares the harness, oracle and inputs of the fuzz tests.

An input must either take effect or be rejected, by an error of the project that a command shows as
one line and that names the cause. A traceback, a hang, or silently accepted bad input fails.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from peft_jax.runtime import exits

SECONDS = 10
"""Limit on the CPU time of one input; its wall time may be ten times as long."""

COUNTS = [30, pytest.param(1000, marks=pytest.mark.slow)]

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**12, 10**30, -(10**30)]),
    st.sampled_from([0.0, 0.5, -0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(["", " ", "0", "none", "auto", "\x00", "\x1b[2J", "../..", "[", "(a+)+$", "é"]),
    st.text(max_size=8),
    st.sampled_from([[], {}, [None], [[]], {"a": None}, [0], ["q_proj"], {"": 0}, {"q_proj": -1}]),
)
"""Values that are invalid for nearly every setting."""


class TooSlowError(Exception):
    """Raised when an input exceeds its time limit."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises `TooSlowError` if the block exceeds the CPU time, or ten times as much wall time.

    Only the CPU time of this thread counts, because other threads may belong to other tests. A
    signal interrupts a block that does not end.
    """
    inside = True

    def stop(*_: object) -> None:
        if inside:
            raise TooSlowError(f"the input took more than {10 * seconds} seconds")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop)
    start = time.thread_time()
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if time.thread_time() - start > seconds:
        raise TooSlowError(f"the input took more than {seconds} seconds of CPU time")


def outcome(action: Callable[[], Any], *, names: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Returns the result of an action, or the message of its rejection.

    Args:
      action: Action, which must end within `SECONDS`.
      names: Texts, one of which the message must contain.
    """
    try:
        with within(SECONDS):
            return action(), ""
    except Exception as error:
        ending = exits.explain(error)
        if ending is None:
            raise
        first = ending.message.split("\n")[0]
        assert first.strip(), "the first line of the message is empty"
        assert "Traceback" not in ending.message
        assert not names or any(name in ending.message for name in names), ending.message
        return None, ending.message


def fuzz(check: Callable[..., None], *drawn: st.SearchStrategy[Any], count: int) -> None:
    """Checks `count` random inputs, which are the same in every run."""
    settings = hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(*drawn)(check))()


LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}


def same(one: Any, other: Any) -> bool:
    """Returns whether two trees of arrays are bitwise equal."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


def copied(folder: Path, to: Path) -> Path:
    """Copies the files of a folder."""
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to
