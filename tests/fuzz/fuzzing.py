"""What the fuzz of every entry point shares: the harness, its oracle, and tiny things to break.

An input may do what it says, or be refused: by an error of the project that a command shows as one
line, and that names the thing. A traceback, a hang or a wrong thing taken without a word fails.
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
"""How long one input may compute; on a busy machine that may take ten times as long."""

COUNTS = [100, pytest.param(1000, marks=pytest.mark.slow)]

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**12, 10**30, -(10**30)]),
    st.sampled_from([0.0, 0.5, -0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(["", " ", "0", "none", "auto", "\x00", "\x1b[2J", "../..", "[", "(a+)+$", "é"]),
    st.text(max_size=8),
    st.sampled_from([[], {}, [None], [[]], {"a": None}, [0], ["q_proj"], {"": 0}, {"q_proj": -1}]),
)
"""Values that no setting or nearly none wants."""


class TooSlowError(Exception):
    """An input took longer than it may."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises `TooSlowError` where the block computes longer, or takes ten times as long.

    Only this thread's computing counts: what other threads do belongs to other tests. What never
    ends is interrupted by a signal, and only within the block.
    """
    inside = True

    def stop(*_: object) -> None:
        if inside:
            raise TooSlowError(f"it had not ended after {10 * seconds} seconds")

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
        raise TooSlowError(f"it computed for more than {seconds} seconds")


def outcome(action: Callable[[], Any], *, names: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Returns what an action gives, or the message that it is refused with.

    Args:
      action: done within `SECONDS`.
      names: texts of which the message must hold one.
    """
    try:
        with within(SECONDS):
            return action(), ""
    except Exception as error:
        ending = exits.explain(error)
        if ending is None:
            raise
        first = ending.message.split("\n")[0]
        assert first.strip(), "a message without a first line"
        assert "Traceback" not in ending.message
        assert not names or any(name in ending.message for name in names), ending.message
        return None, ending.message


def fuzz(check: Callable[..., None], *drawn: st.SearchStrategy[Any], count: int) -> None:
    """Checks so many drawn inputs, the same ones at every start."""
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
    """Whether two trees of arrays are equal bit for bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


def copied(folder: Path, to: Path) -> Path:
    """A folder's files, copied."""
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to
