"""Times the training steps of all arms, in turns of a few steps.

Times from within separate runs would depend on the machine's load at that moment. Taking turns
exposes all arms to the same changes of the machine's speed.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence

import jax

from .bench import Bench
from .cell import Start, make_start
from .settings import ArmSettings
from .trials import Trial

ROUNDS = 7
STEPS = 6
_RATE = 1e-6
"""Small, so that no arm diverges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Cost of an arm's step.

    Attributes:
      rounds: Seconds per step, by round.
      step_bytes: Memory of the compiled step in bytes.
    """

    rounds: tuple[float, ...]
    step_bytes: int

    @property
    def seconds(self) -> float:
        """Returns the median seconds per step."""
        return statistics.median(self.rounds)


def time_arms(
    bench: Bench,
    arms: Sequence[ArmSettings],
    *,
    seed: int,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, Timing]:
    """Returns each arm's cost of a step.

    Args:
      bench: Model, data and programs of the task.
      arms: Arms to time.
      seed: Seed of the data; all arms take the same batches.
      rounds: Number of timed turns of each arm, after one for warm-up.
      steps: Steps per turn.
    """
    first = bench.batches(seed)[:steps]
    batches = list(itertools.islice(itertools.cycle(first), steps))
    starts = {arm.name: make_start(bench, arm, Trial(_RATE), seed=seed) for arm in arms}
    states = {name: start.state for name, start in starts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(rounds + 1):
        for name, start in starts.items():
            states[name], spent = _turn(start, states[name], batches)
            if turn:
                seconds[name].append(float(f"{spent / steps:.5g}"))
    return {
        name: Timing(rounds=tuple(found), step_bytes=starts[name].program.step_bytes)
        for name, found in seconds.items()
    }


def _turn(start: Start, state, batches):
    """Trains on the batches, and returns the state and the seconds."""
    began = time.perf_counter()
    for batch in batches:
        state, metrics = start.step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - began
