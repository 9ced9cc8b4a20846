"""Tests a study's statistics against scipy, and the script that rechecks them."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from small_study import fake_cells, small_study, without_source

from eval.study import recheck
from eval.study.analysis import analyze
from eval.study.page import verdict, write_page
from eval.study.statistics import (
    Comparison,
    compare,
    crossed_interval,
    holm,
    mean_and_deviation,
    paired_t_p,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    found = without_source(small_study(folder / "model", folder / "rows"))
    return dataclasses.replace(found, seeds=tuple(range(1, 9)))


def test_the_paired_test_agrees_with_scipy():
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.01, 0.1):
        one, other = generator.normal(shift, 0.02, 8), generator.normal(0.0, 0.02, 8)
        expected = stats.ttest_rel(one, other).pvalue
        assert paired_t_p(list(one - other)) == pytest.approx(expected, rel=1e-9)
    assert paired_t_p([0.0, 0.0]) == 1.0


def test_the_interval_covers_rows_and_seeds():
    """Of 200 intervals of data with effects of rows and seeds, about 95% contain the mean."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        rows, seeds = generator.normal(0, 1, 60), generator.normal(0, 1, (15, 1))
        differences = 0.3 + rows + seeds + generator.normal(0, 0.5, (15, 60))
        low, high = crossed_interval(differences, np.ones(60), rounds=400)
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 1.0


def test_the_interval_is_wider_than_over_rows_alone():
    generator = np.random.default_rng(2)
    differences = np.ones((8, 100)) * generator.normal(0, 1, (8, 1))
    low, high = crossed_interval(differences, np.ones(100), rounds=1000)
    assert high - low > 0.5
    flat = np.broadcast_to(differences.mean(axis=0), (8, 100))
    assert np.ptp(crossed_interval(flat, np.ones(100), rounds=1000)) < 1e-9


def test_holm_correction_and_deviation():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert mean_and_deviation([1.0, 3.0, 5.0]) == (3.0, 2.0)


def test_arms_are_compared_only_on_the_same_rows():
    cell = {"seed": 1, "row_losses": [1.0, 1.0], "row_targets": [1, 1]}
    with pytest.raises(ValueError, match="same seeds"):
        compare([cell], [{**cell, "seed": 2}])
    with pytest.raises(ValueError, match="same rows"):
        compare([cell], [{**cell, "row_targets": [1, 2]}])
    found = compare(
        [cell, {**cell, "seed": 2}],
        [{**cell, "row_losses": [2.0, 3.0]}, {**cell, "seed": 2, "row_losses": [0.0, 1.0]}],
    )
    assert (found.difference, found.seeds_ahead, found.seeds, found.rows) == (-0.5, 1, 2, 2)
    assert found.low == -2.0
    assert found.high == 1.0


@pytest.mark.parametrize(
    ("difference", "p", "expected"),
    [
        (-0.05, 0.01, "hybrid better"),
        (0.05, 0.01, "hybrid worse"),
        (-0.05, 0.06, "no difference shown"),
        (-0.01, 0.01, "no difference shown"),
    ],
)
def test_a_verdict_needs_the_test_and_the_interval(difference, p, expected):
    found = Comparison(
        difference=difference,
        low=difference - 0.02,
        high=difference + 0.02,
        deviation=0.01,
        p=p,
        seeds_ahead=0,
        seeds=8,
        rows=10,
    )
    assert verdict(found, p) == expected


def test_the_contrast_is_with_the_branch_that_tuning_prefers(study, tmp_path):
    """The branch with the lower test loss need not be the one."""
    store = fake_cells(study, tmp_path, losses={"low": 1.2, "turn": 1.1, "both": 0.9})
    (task,) = study.tasks
    found = analyze(study, store).contrasts["words"]
    assert found.branch == "turn"
    assert found.comparison.difference == pytest.approx(-0.2, abs=0.02)
    # On tuning rows the other branch is better.
    arm = study.arm("low")
    file = store.path(task, arm, study.grid(task, arm).trial((-1, 0)), seed=0, final=False)
    cell = json.loads(file.read_text()) | {"loss": 0.01}
    file.write_text(json.dumps(cell))
    assert analyze(study, store).contrasts["words"].branch == "low"


def test_recheck_confirms_the_page_and_finds_changes(study, tmp_path, capsys):
    store = fake_cells(study, tmp_path, losses={"low": 1.02, "both": 0.99})
    write_page(study, store, tmp_path)
    flags = [f"--cells={tmp_path / 'cells'}", f"--statistics={tmp_path / 'statistics.json'}"]
    assert recheck.main(flags) == 0
    assert "0 disagreements" in capsys.readouterr().out
    right = json.loads((tmp_path / "statistics.json").read_text())
    assert len(right["contrasts"]) == 1
    assert len(right["exploratory"]) == 4

    def changed(field, value, of="contrasts"):
        records = {"contrasts": [], "exploratory": [], of: [{**right[of][0], field: value}]}
        return recheck.disagreements(tmp_path / "cells", {**right, **records})

    contrast = right["contrasts"][0]
    for field, value in (
        ("difference", contrast["difference"] + 1e-4),
        ("low", contrast["low"] - 0.01),
        ("high", contrast["high"] + 0.01),
        ("p", contrast["p"] + 1e-3),
        ("seeds", 7),
        ("corrected_p", min(1.0, contrast["corrected_p"] + 0.1)),
    ):
        assert any(field in line for line in changed(field, value)), field
    other = "low" if contrast["other"] == "turn" else "turn"
    assert any("lower tuning loss" in line for line in changed("other", other))
    broken = json.dumps({**right, "contrasts": [{**contrast, "p": 0.5}]})
    (tmp_path / "statistics.json").write_text(broken)
    assert recheck.main(flags) == 1
