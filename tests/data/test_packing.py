"""Packing keeps every token once, with its loss mask and position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_jax.data.encode import Encoded
from peft_jax.data.packing import fill_row, first_fit_decreasing

PAD = 7


def sequence(generator: np.random.Generator, positions: int) -> Encoded:
    return Encoded(
        ids=generator.integers(10, 1000, positions + 1).astype(np.int32),
        loss_mask=generator.integers(0, 2, positions + 1).astype(bool),
    )


@given(st.lists(st.integers(1, 16), max_size=40), st.integers(0, 2**32 - 1))
def test_every_token_is_in_one_row_with_its_own_mask_and_position(lengths, seed):
    capacity = 16
    generator = np.random.default_rng(seed)
    sequences = [sequence(generator, length) for length in lengths]
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(item for row in bins for item in row) == list(range(len(lengths)))
    for row in bins:
        members = [sequences[item] for item in row]
        batch = fill_row(members, capacity, PAD)
        assert batch.tokens.shape == (capacity,)
        for number, member in enumerate(members, start=1):
            here = batch.segment_ids == number
            assert batch.tokens[here].tolist() == member.ids[:-1].tolist()
            assert batch.targets[here].tolist() == member.ids[1:].tolist()
            assert batch.loss_mask[here].tolist() == member.loss_mask[1:].astype(float).tolist()
            assert batch.positions[here].tolist() == list(range(member.positions))
        empty = batch.segment_ids == 0
        assert empty.sum() == capacity - sum(member.positions for member in members)
        assert (batch.tokens[empty] == PAD).all()
        assert not batch.loss_mask[empty].any()
        # Segments are consecutive, and padding is on the right.
        order = np.where(empty, len(members) + 1, batch.segment_ids)
        assert (np.diff(order) >= 0).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_at_most_one_bin_is_at_most_half_full(lengths):
    capacity = 50
    bins = first_fit_decreasing(lengths, capacity)
    loads = [sum(lengths[item] for item in row) for row in bins]
    assert max(loads) <= capacity
    # Two bins that are at most half full would have been one.
    assert sum(2 * load <= capacity for load in loads) <= 1


def test_long_items_are_placed_first():
    assert first_fit_decreasing([2, 5, 4, 3], 7) == [[1, 0], [2, 3]]
    assert first_fit_decreasing([], 7) == []


def test_an_item_longer_than_a_bin_raises():
    with pytest.raises(ValueError, match="length 8 does not fit a bin of 7"):
        first_fit_decreasing([3, 8], 7)


def test_an_empty_row_is_padding_outside_the_loss():
    row = fill_row([], 4, PAD)
    assert row.tokens.tolist() == [PAD] * 4
    assert not row.segment_ids.any()
    assert not row.loss_mask.any()
