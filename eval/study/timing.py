"""How long a training step of each arm takes, side by side.

The seconds within a run would be of that run's minute: whatever else the machine did then is in
them. Here all arms take turns, a few steps each, so that a change in the machine's speed meets all.
"""

import itertools
import time
from collections.abc import Sequence

import jax

from .bench import Bench
from .cell import Start, make_start
from .settings import ArmSettings

ROUNDS = 7
STEPS = 6
_RATE = 1e-6
"""Small, so that no arm leaves the region where its numbers are ordinary ones."""


def time_arms(
    bench: Bench,
    arms: Sequence[ArmSettings],
    *,
    seed: int,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, list[float]]:
    """Seconds a step, by arm's name, a number a round.

    Args:
      bench: the task.
      arms: what is timed.
      seed: of the data; all arms take the same batches.
      rounds: turns of each arm that are counted; one more before them is not.
      steps: in a turn.
    """
    first = bench.batches(seed)[:steps]
    batches = list(itertools.islice(itertools.cycle(first), steps))
    starts = {arm.name: make_start(bench, arm, learning_rate=_RATE, seed=seed) for arm in arms}
    states = {name: start.state for name, start in starts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(rounds + 1):
        for name, start in starts.items():
            states[name], spent = _turn(start, states[name], batches)
            if turn:
                seconds[name].append(float(f"{spent / steps:.5g}"))
    return seconds


def _turn(start: Start, state, batches):
    """The state after the batches, and the seconds they took."""
    began = time.perf_counter()
    for batch in batches:
        state, metrics = start.step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - began
