"""Tests the search for the best trial of an arm."""

import math

import pytest

from eval.study.trials import Grid, Trial


def run(grid, loss_of, most=100):
    """Runs the search as a study does, and returns its choice and the trials in order."""
    losses, order = {}, []
    for _ in range(most):
        state = grid.search(losses.get)
        if not state.missing:
            return state.choice, order
        for trial in state.missing:
            assert trial not in losses
            losses[trial] = loss_of(trial)
            order.append(trial)
    raise AssertionError("the search does not end")


def bowl(rate, scale):
    """Returns a loss with its minimum at a rate and a scale."""
    return lambda t: (math.log(t.rate / rate)) ** 2 + (math.log(t.scale / scale)) ** 2


GRID = Grid((1e-3, 1e-2, 1e-1), (0.25, 1.0, 4.0), 4)


def test_an_inner_best_needs_no_extension():
    choice, order = run(GRID, bowl(1e-2, 1.0))
    assert choice.trial == Trial(1e-2, 1.0)
    assert (choice.trials, choice.extensions, choice.edges) == (9, 0, ())
    assert len(order) == 9


def test_the_search_follows_the_loss_along_both_axes():
    choice, order = run(GRID, bowl(1.0, 16.0))
    assert choice.trial == Trial(1.0, 16.0)
    # The neighbors of the corner: rate 1, rate 10 and scale 16 beyond it, then at the best.
    assert order[9:] == [Trial(1.0, 4.0), Trial(10.0, 4.0), Trial(1.0, 1.0), Trial(1.0, 16.0)]
    assert choice.edges == ("lower rate", "higher rate", "higher scale")


def test_edges_remain_when_the_extensions_are_used_up():
    choice, _ = run(GRID, lambda trial: -trial.rate)
    assert choice.trial == Trial(1000.0, 0.25)
    assert choice.extensions == 4
    assert "higher rate" in choice.edges


def test_diverged_trials_are_no_choice():
    choice, _ = run(GRID, lambda trial: math.inf if trial.rate > 5e-3 else trial.scale)
    assert choice.trial.rate == 1e-3
    assert choice.diverged >= 6
    assert run(GRID, lambda trial: math.inf)[0] is None


@pytest.mark.parametrize("axis", ["rates", "scales"])
def test_an_axis_of_one_value_is_not_extended(axis):
    values = {"rates": (1e-3, 1e-2), "scales": (1.0, 4.0), axis: (1.0,)}
    choice, order = run(Grid(values["rates"], values["scales"], 4), lambda t: t.rate + t.scale)
    assert all(getattr(trial, axis[:-1]) == 1.0 for trial in order)
    assert choice.extensions == 4


def test_the_search_resumes_from_any_part_of_the_trials():
    losses = {}
    whole, order = run(GRID, bowl(1.0, 16.0))
    for trial in reversed(order):
        losses[trial] = bowl(1.0, 16.0)(trial)
    assert GRID.search(losses.get).choice == whole
    del losses[order[0]]
    assert GRID.search(losses.get).missing == (order[0],)
