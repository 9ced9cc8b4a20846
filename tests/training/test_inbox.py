"""The inbox waits for nothing but what is too far behind."""

import dataclasses

import jax.numpy as jnp

from peft_jax.training.inbox import Inbox


@dataclasses.dataclass
class Pending:
    """Stands in for an array that is not computed yet."""

    done: bool = False

    def is_ready(self) -> bool:
        return self.done

    def block_until_ready(self):
        self.done = True
        return self


def test_what_is_done_comes_out_in_order_and_the_rest_stays():
    inbox, values = Inbox(ahead=8), [Pending() for _ in range(3)]
    for step, value in enumerate(values, start=1):
        inbox.put(step, [value], tokens=10 * step)
    assert list(inbox.ready()) == []
    values[0].done = values[2].done = True
    assert [(m.step, m.tokens) for m in inbox.ready()] == [(1, 10)]
    assert not values[1].done
    assert [m.step for m in inbox.drain()] == [2, 3]
    assert values[1].done


def test_only_what_is_too_far_behind_is_waited_for():
    inbox, values = Inbox(ahead=2), [Pending() for _ in range(4)]
    for step, value in enumerate(values, start=1):
        inbox.put(step, [value], tokens=1)
    assert [m.step for m in inbox.ready()] == [1, 2]
    assert [value.done for value in values] == [True, True, False, False]


def test_real_arrays():
    inbox = Inbox()
    inbox.put(1, {"loss": jnp.ones(()) * 2}, tokens=3)
    (measured,) = inbox.drain()
    assert float(measured.values["loss"]) == 2.0
