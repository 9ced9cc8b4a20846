"""Tests that `PendingMetrics` waits only for steps that are too far behind."""

import dataclasses

import jax.numpy as jnp

from peft_jax.runtime.pending import PendingMetrics


@dataclasses.dataclass
class Pending:
    """Mock of an array that is not computed yet."""

    done: bool = False

    def is_ready(self) -> bool:
        return self.done

    def block_until_ready(self):
        self.done = True
        return self


def test_finished_steps_are_returned_in_order():
    pending, values = PendingMetrics(ahead=8), [Pending() for _ in range(3)]
    for step, value in enumerate(values, start=1):
        pending.put(step, [value], tokens=10 * step)
    assert list(pending.ready()) == []
    values[0].done = values[2].done = True
    assert [(m.step, m.tokens) for m in pending.ready()] == [(1, 10)]
    assert not values[1].done
    assert [m.step for m in pending.drain()] == [2, 3]
    assert values[1].done


def test_only_steps_too_far_behind_are_waited_for():
    pending, values = PendingMetrics(ahead=2), [Pending() for _ in range(4)]
    for step, value in enumerate(values, start=1):
        pending.put(step, [value], tokens=1)
    assert [m.step for m in pending.ready()] == [1, 2]
    assert [value.done for value in values] == [True, True, False, False]


def test_metrics_of_jax_arrays_are_returned():
    pending = PendingMetrics()
    pending.put(1, {"loss": jnp.ones(()) * 2}, tokens=3)
    (measured,) = pending.drain()
    assert float(measured.values["loss"]) == 2.0
