"""Tests the settings of a study, and its pages and command without training."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small_study import fake_cells, small_study, without_source

from eval.study import recheck, settings
from eval.study.adapter_sizes import TOLERANCE, check_budget, trainable_sizes
from eval.study.cell import averaged
from eval.study.command import load_study
from eval.study.convergence import steps_to_match
from eval.study.facts import has_few_levels, lost_text
from eval.study.measuring import BINS, calibration
from eval.study.page import write_page
from eval.study.run import run_study
from eval.study.settings import Roles, digest
from eval.study.store import Store
from eval.study.trial_optimizer import set_rates, trial_optimizer
from eval.study.trials import Trial
from peft_jax.optim import MixingSettings, OptimizerSettings, ScheduleSettings, make_optimizer

COMMITTED = Path(__file__).parents[2] / "configs" / "study_cpu.py"
COMMITTED_CELLS = Path(__file__).parents[2] / "docs" / "study"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    return without_source(small_study(folder / "model", folder / "rows"))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    return fake_cells(study, tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def committed(shared_data):
    return load_study(COMMITTED, str(shared_data))


# The optimizer whose rates are in the state.


@pytest.mark.parametrize("steps", [3, 6])
def test_rates_in_the_state_match_constants(steps):
    own = {"learning_rates": {"head": 0.2}, "weight_decay": 0.1}
    schedule = ScheduleSettings(name="cosine", warmup_ratio=0.3)
    plain = OptimizerSettings(
        learning_rate=0.03, schedule=schedule, rate_factors={"w": 4.0, "attn": 0.25}, **own
    )
    general = OptimizerSettings(rate_factors={"w": 1.0, "attn": 1.0}, **own)
    one, other = trial_optimizer(general, 6), make_optimizer(plain, steps)
    params = {"attn": {"w": jnp.arange(3.0)}, "head": {"w": jnp.arange(2.0)}, "x": jnp.ones(2)}
    states = [set_rates(one.init(params), plain, steps), other.init(params)]
    for step in range(steps):
        gradients = jax.tree.map(lambda leaf, at=step: jnp.cos(leaf + at), params)
        updates = []
        for index, optimizer in enumerate((one, other)):
            found, states[index] = optimizer.update(gradients, states[index], params)
            updates.append(found)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(same, *updates)
        params = optax.apply_updates(params, updates[0])


@pytest.mark.parametrize("name", ["prodigy", "schedule_free_adamw"])
def test_an_optimizer_with_its_rate_inside_is_rejected(name):
    settings = OptimizerSettings(name=name, schedule=ScheduleSettings(name="constant"))
    with pytest.raises(ValueError, match=f"optimizer.name is '{name}'.* another optimizer"):
        trial_optimizer(settings, 4)


def test_a_program_serves_all_trials():
    settings = OptimizerSettings(rate_factors={"w": 1.0})
    optimizer = trial_optimizer(settings, 4)
    params = {"w": jnp.ones(2), "x": jnp.ones(2)}
    update = jax.jit(optimizer.update)
    steps = []
    for rate, factor in ((0.1, 1.0), (0.2, 1.0), (0.1, 4.0)):
        trial = dataclasses.replace(settings, learning_rate=rate, rate_factors={"w": factor})
        state = set_rates(optimizer.init(params), trial, 2)
        updates, _ = update(jax.tree.map(jnp.ones_like, params), state, params)
        steps.append([float(updates[name][0]) for name in ("w", "x")])
    assert update._cache_size() == 1
    np.testing.assert_allclose(steps, [[-0.1, -0.1], [-0.2, -0.2], [-0.4, -0.1]], rtol=1e-5)


# Settings.


def test_a_trial_sets_the_rate_and_the_scale_of_the_attention(study):
    (task,) = study.tasks
    arm = dataclasses.replace(study.arm("both"), rate_factors={"b": 16.0})
    config = task.run_config(arm, Trial(1e-2, 4.0), seed=1)
    assert config.optimizer.learning_rate == 1e-2
    assert dict(config.optimizer.rate_factors) == {"b": 16.0, "self_attn": 4.0}
    assert config.mixing.rotation_rate == 2.0
    assert config.train.steps == 4
    assert task.run_config(arm, Trial(1e-2), seed=0, final=False).train.steps == 2
    other = task.run_config(study.arm("low"), Trial(1e-2), seed=1)
    assert other.mixing == MixingSettings().with_rates({})
    ranks = {"both": {"rank_pattern": {"q_proj": 1}}}
    changed = dataclasses.replace(task, methods=ranks)
    config = changed.run_config(study.arm("both"), Trial(1e-2), seed=1)
    assert dict(config.spec.rank_pattern) == {"q_proj": 1}


def test_mixing_changes_only_the_digest_of_a_hybrid(study):
    (task,) = study.tasks
    for arm in study.arms:
        config = task.run_config(arm, Trial(1e-2), seed=1)
        before = digest(config, task, final=True)
        object.__setattr__(config, "mixing", MixingSettings(rule="fixed", rotation_rate=3.0))
        assert (digest(config, task, final=True) == before) == (arm.name != "both")


def test_a_new_setting_keeps_the_digests_of_committed_cells(study, monkeypatch):
    (task,) = study.tasks
    config = task.run_config(study.arm("low"), Trial(1e-2), seed=1)
    monkeypatch.setattr(settings, "SINCE_THEN", {"data.packing_window": 1024})
    without = digest(config, task, final=True)
    changed = dataclasses.replace(config.data, packing_window=7)
    object.__setattr__(config, "data", changed)
    assert digest(config, task, final=True) != without
    monkeypatch.undo()


def test_unfair_settings_are_rejected(study):
    task = study.tasks[0]
    with pytest.raises(ValueError, match="the same number"):
        dataclasses.replace(task, grids={"low": (1.0, 2.0, 3.0), "turn": (1.0, 2.0)})
    with pytest.raises(ValueError, match="must be increasing"):
        dataclasses.replace(task, grids={"low": (2.0, 1.0)})
    with pytest.raises(ValueError, match=r"scales is .* must be increasing"):
        dataclasses.replace(task, scales=(4.0, 1.0))
    with pytest.raises(ValueError, match=r"tune_steps is 5 .* at most train.steps, which is 4"):
        dataclasses.replace(task, tune_steps=5)
    without = dataclasses.replace(task, grids={"low": (1.0, 2.0)})
    with pytest.raises(ValueError, match="no grid 'turn'"):
        dataclasses.replace(study, tasks=(without,))
    more = dataclasses.replace(task, name="more", scales=(1.0, 2.0, 4.0))
    with pytest.raises(ValueError, match="must all have the same number"):
        dataclasses.replace(study, tasks=(task, more))
    with pytest.raises(ValueError, match="among the seeds"):
        dataclasses.replace(study, tune_seed=1)
    with pytest.raises(ValueError, match="among the seeds"):
        dataclasses.replace(study, tasks=(dataclasses.replace(task, seeds=(0, 1)),))
    with pytest.raises(ValueError, match="at least two, without duplicates"):
        dataclasses.replace(study, seeds=(1, 1))
    with pytest.raises(ValueError, match="no arm 'lo'"):
        dataclasses.replace(study, tasks=(dataclasses.replace(task, arms=("lo",)),))
    config = ConfigDict(task.config.to_dict())
    config.data.hold_out = None
    with pytest.raises(ValueError, match="hold_out"):
        dataclasses.replace(task, config=config)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (Roles(hybrid="neither", branches=("low",)), "no arm 'neither'"),
        (Roles(branches=("low",)), "hybrid is empty, but roles.branches"),
        (Roles(hybrid="low", branches=("turn",)), "is the arm 'low', whose method is 'lora_ga'"),
        (Roles(hybrid="both"), "branches is empty"),
    ],
)
def test_roles_that_do_not_fit_are_rejected(study, roles, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(study, roles=roles)


def test_the_committed_study_is_well_formed():
    for data in ("", "/data"):
        study = load_study(COMMITTED, data)
        for task in study.tasks:
            assert len(study.seeds_of(task)) >= 5
            for arm in study.arms_of(task):
                grid = study.grid(task, arm)
                assert len(grid.points()) == 9
                config = task.run_config(arm, grid.trial((0, 0)), seed=1)
                assert config.spec.method.name == arm.method["name"]


@pytest.mark.slow
def test_the_committed_arms_meet_the_budget(committed):
    for task in committed.tasks:
        if not Path(task.config.model.path).is_dir():
            continue
        check_budget(committed, task)
        sizes = trainable_sizes(committed, task)
        budget = [sizes[arm.name] for arm in committed.arms_of(task) if arm.at_budget]
        assert len(budget) >= 4
        assert max(budget) <= (1 + TOLERANCE) * min(budget)


def test_committed_cells_are_of_todays_settings():
    """Whoever adds a setting with a neutral default names it in `SINCE_THEN`."""
    files = sorted((COMMITTED_CELLS / "cells").glob("*/*/*.json"))
    if not files:
        pytest.skip("no cells are committed yet")
    # The folder of the data need not exist.
    study = load_study(COMMITTED, "DATA")
    store = Store(COMMITTED_CELLS)
    tasks = {task.name: task for task in study.tasks}
    for file in files:
        cell = json.loads(file.read_text(encoding="utf-8"))
        task, arm = tasks[cell["task"]], study.arm(cell["arm"])
        trial = Trial(cell["learning_rate"], cell["attention_scale"])
        final = file.name.startswith("seed-")
        assert store.read(task, arm, trial, seed=cell["seed"], final=final) is not None, file
        assert file.stat().st_size <= (10_000 if final else 1_000), file
    page = COMMITTED_CELLS / "statistics.json"
    if not page.is_file():
        # Until the page of these cells is committed, the old one says what it is of.
        assert "run with version 0.1" in (COMMITTED_CELLS / "README.md").read_text(encoding="utf-8")
        return
    statistics = json.loads(page.read_text(encoding="utf-8"))
    assert recheck.disagreements(COMMITTED_CELLS / "cells", statistics) == []


def test_pages_are_made_where_model_and_data_are_not(study, tmp_path):
    task = dataclasses.replace(study.tasks[0], model="a model")
    here = dataclasses.replace(study, tasks=(task,))
    fake_cells(here, tmp_path)
    config = ConfigDict(task.config.to_dict())
    config.model.path, config.data.path = "/nowhere/other", "/nowhere/rows"
    elsewhere = dataclasses.replace(here, tasks=(dataclasses.replace(task, config=config),))
    text = write_page(elsewhere, Store(tmp_path), tmp_path / "page").read_text()
    assert "All 18 cells are done." in text


# Measurements.


def test_calibration_of_sure_answers():
    bins = np.zeros((3, BINS))
    bins[:, -1] = (4, 4, 3)
    assert calibration(bins) == {"ece": 0.25, "confidence": 1.0, "accuracy": 0.75}
    assert calibration(np.zeros((3, BINS))) == {}


def test_series_are_averaged_over_equal_parts():
    values = np.arange(120.0)
    found = averaged(values)
    assert len(found) == 50
    np.testing.assert_allclose(found[0], np.mean([0, 1, 2]))
    assert np.average(found, weights=[len(p) for p in np.array_split(values, 50)]) == 59.5


def test_steps_to_another_arms_loss_are_paired_by_seed():
    def cells(*curves):
        return [{"curve": {"steps": [10, 20], "losses": list(losses)}} for losses in curves]

    found = steps_to_match(cells((3.0, 1.0), (3.0, 2.5)), cells((4.0, 2.0), (4.0, 1.0)))
    assert (found.reached, found.seeds, found.steps) == (1, 2, None)
    found = steps_to_match(cells((3.0, 1.0)), cells((4.0, 2.0)))
    assert found.steps == 15.0


def test_lost_characters_are_counted():
    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text.lower() if c not in "=+"]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    found = lost_text(Tokenizer(), ["A = B + C", "= =", "fine text"])
    assert found == {
        "rows": 3,
        "rows_affected": 2,
        "characters": 5 + 2 + 8,
        "lost": 4,
        "symbols": {"=": 3, "+": 1},
    }


def test_dequantized_kernels_are_recognized():
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(2, 64, 40)).astype(np.float32)
    assert not has_few_levels(jnp.asarray(kernel))
    blocks = kernel.reshape(2, 2, 32, 40)
    low, high = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True)
    step = (high - low) / 15
    rounded = low + np.round((blocks - low) / step) * step
    assert has_few_levels(jnp.asarray(rounded.reshape(kernel.shape)))


# Pages and files.


def test_a_pattern_without_matches_is_rejected(study, tmp_path):
    for only, message in (
        ("words/lora", "the tasks words and the arms low, turn, both"),
        ("(", "regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(study, Store(tmp_path), only=only)


def test_a_page_is_not_replaced_by_an_empty_one(study, tmp_path):
    write_page(study, Store(tmp_path), tmp_path)
    before = (tmp_path / "README.md").read_text()
    assert "Not known yet" in before
    assert "Not measured yet" in (tmp_path / "claims.md").read_text()
    with pytest.raises(ValueError, match="no cell of the study is finished"):
        write_page(study, Store(tmp_path), tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_a_file_without_a_study_is_rejected(tmp_path):
    file = tmp_path / "none.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no get_config\(data\)"):
        load_study(file)


def test_a_claimed_cell_is_skipped_by_others(study, tmp_path):
    store = Store(tmp_path)
    (task,) = study.tasks
    path = store.path(task, study.arms[0], Trial(1e-3), seed=0, final=False)
    with store.claim(path) as mine:
        assert mine
        with Store(tmp_path).claim(path) as other:
            assert not other
    with store.claim(path) as mine:
        assert mine
    assert not list(tmp_path.glob("cells/**/*")), "locks are not among the cells"


def test_a_page_reports_unfinished_cells(study, tmp_path):
    store = fake_cells(study, tmp_path)
    for file in (tmp_path / "cells" / "words" / "both").glob("seed-2.json"):
        file.unlink()
    store.timing_path(study.tasks[0]).unlink()
    store.facts_path(study.tasks[0]).unlink()
    text = write_page(study, store, tmp_path / "page").read_text()
    assert "**Not finished:** 17 of 18 cells are done. Unfinished: words: both." in text
    assert "not timed" in text
    assert "Rows are not counted yet" in text
    assert "Not known yet: on no task are the hybrid" in text


def test_the_page_states_rows_lost_text_and_open_edges(study, finished, tmp_path):
    text = write_page(study, finished, tmp_path).read_text()
    assert "8 of 9 train rows are used (1 too long)" in text
    assert "5 of 200 characters of the test rows (2.5%), in 3 of 12 rows, mostly `= +`" in text
    assert "dequantized from four bits" in text
    assert text.count("lower rate, lower scale") == 3, "the edges of every arm"
    assert "**" not in text.split("## The arms")[1], "no bold in tables"
    claims = (tmp_path / "claims.md").read_text()
    assert claims.count("**Claimed.**") == claims.count("**To say more.**") == 8


def test_an_arm_that_is_only_timed_counts_for_time_and_memory(study, tmp_path):
    """Its steps cost 0.2 s and 3 MiB, and the hybrid's 2 MiB."""
    roles = Roles(hybrid="both", branches=("low",), full="turn")
    task = dataclasses.replace(study.tasks[0], arms=("low", "both"), timed=("turn",))
    timed = dataclasses.replace(study, tasks=(task,), roles=roles)
    assert [arm.name for arm in timed.timed_on(task)] == ["low", "both", "turn"]
    store = fake_cells(timed, tmp_path)
    text = write_page(timed, store, tmp_path).read_text()
    assert "| turn |" not in text
    claims = (tmp_path / "claims.md").read_text()
    assert "| Words | 0.200 | 0.200 | 1.00× | not trained |" in claims
    assert "| Words | 2 | 3 | 67% |" in claims


def test_a_task_may_have_a_subset_of_the_arms(study, finished, tmp_path):
    few = dataclasses.replace(study.tasks[0], arms=("both", "low"))
    fewer = dataclasses.replace(study, tasks=(few,))
    assert [arm.name for arm in fewer.arms_of(few)] == ["low", "both"]
    text = write_page(fewer, Store(finished.workdir), tmp_path).read_text()
    assert "All 12 cells are done." in text
    assert "on no task are the hybrid and all of its branches" in text
    assert json.loads((tmp_path / "statistics.json").read_text())["planned_contrasts"] == 0


def test_a_missing_metric_is_not_shown_as_diverged(study, finished, tmp_path):
    task = dataclasses.replace(study.tasks[0], metric="accuracy")
    changed = dataclasses.replace(study, tasks=(task,))
    text = write_page(changed, Store(finished.workdir), tmp_path).read_text()
    assert "| arm | seeds | test loss | accuracy |" in text
    assert text.count("not measured") == 3


def test_a_study_needs_no_hybrid(study, finished, tmp_path):
    plain = dataclasses.replace(study, arms=study.arms[:2], roles=Roles(lora="low"))
    text = write_page(plain, Store(finished.workdir), tmp_path).read_text()
    assert "All 12 cells are done." in text
    assert "better branch" not in text
    assert "(curves.png)" in text


def test_a_page_is_written_for_a_hybrid_that_diverged(study, tmp_path):
    """Covers divergence in one seed, after some steps, and in all seeds."""
    store = fake_cells(study, tmp_path)
    for file in sorted((tmp_path / "cells" / "words" / "both").glob("seed-*.json")):
        cell = json.loads(file.read_text())
        series = {name: values[:1] for name, values in cell["steps"]["lambda"]["layers"].items()}
        gone = {
            **cell,
            "diverged": True,
            "loss": None,
            "row_losses": [None] * len(cell["row_losses"]),
            "forgetting": None,
            "curve": {"steps": [], "losses": []},
            "steps": {**cell["steps"], "grad_norm": [None], "lambda": {"layers": series}},
        }
        file.write_text(json.dumps(gone))
        text = write_page(study, store, tmp_path / "page").read_text()
        assert "diverged" in text
        assert "Not known yet: on no task are the hybrid" in text
        assert "(lambda.png)" not in text
    row = next(line for line in text.splitlines() if line.startswith("| both | 2 |"))
    assert row.count("diverged") == 2
