"""Tests a small study from training to its page: protocol, cells on disk, measurements."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_study import WORDS, small_study, write_checkpoint, write_rows

from eval.study.analysis import analyze
from eval.study.bench import Bench
from eval.study.cell import PARTS, train_cell
from eval.study.facts import facts_digest
from eval.study.page import write_page
from eval.study.run import count_cells, count_finished, run_study, search
from eval.study.source import _fingerprint
from eval.study.store import SCRATCH, Store
from eval.study.timing import ROUNDS
from eval.study.trials import Trial
from peft_jax.core import flatten
from peft_jax.training import RefusedError, run
from peft_jax.training.blueprint import Blueprint
from peft_jax.training.report.metrics import read_records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def study(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    return small_study(checkpoint, folder)


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """Returns a study that was stopped after one arm, and resumed in another order."""
    store = Store(tmp_path_factory.mktemp("study"))
    said: list[str] = []
    run_study(study, store, only="/both$", say=said.append)
    first = len(said)
    run_study(study, store, say=said.append)
    return store, said, first


@pytest.fixture(scope="module")
def bench(study):
    """Returns the loaded task, for tests that start arms by themselves."""
    return Bench(study.tasks[0], study.arms[0])


def place(study, arm, *, final=False):
    """Returns the arguments that name a cell: its first trial, or a measured one."""
    trial = study.grid(study.tasks[0], arm).trial((0, 0))
    return (study.tasks[0], arm, trial), {"seed": 1 if final else 0, "final": final}


def test_every_cell_runs_once(study, finished):
    store, said, first = finished
    (task,) = study.tasks
    assert count_cells(study) == count_finished(study, store) == 3 * (4 + 2)
    choices = [search(study, store, task, arm).choice for arm in study.arms]
    extensions = sum(choice.extensions for choice in choices)
    assert first == 6 + choices[2].extensions
    assert len(said) == 18 + extensions + 2
    assert said[first] == "words: counted the rows and measured the base model"
    assert said[-1] == "words: timed the steps of 3 arms"
    again: list[str] = []
    run_study(study, store, say=again.append)
    assert again == []


def test_a_work_directory_holds_only_small_cells(study, finished):
    store, _, _ = finished
    files = [file for file in store.workdir.rglob("*") if file.is_file()]
    cells = [file for file in files if SCRATCH not in file.parts]
    assert {file.suffix for file in cells} == {".json"}
    for file in cells:
        limit = 10_000 if file.name.startswith("seed-") else 1_000
        assert file.stat().st_size < limit or file.name == "timing.json"


def test_a_cell_with_other_settings_runs_again(study, finished):
    store, _, _ = finished
    (task,) = study.tasks
    arguments, names = place(study, study.arms[0])
    assert store.read(*arguments, **names) is not None
    longer = ConfigDict(task.config.to_dict())
    longer.train.batch_size = 5
    other = dataclasses.replace(task, config=longer)
    assert Store(store.workdir).read(other, *arguments[1:], **names) is None
    # The learning curve is no part of a tuning run.
    fewer = dataclasses.replace(task, curve_points=1)
    assert store.read(fewer, *arguments[1:], **names) is not None
    choice = search(study, store, task, study.arms[0]).choice
    final = {"seed": 1, "final": True}
    assert store.read(task, study.arms[0], choice.trial, **final) is not None
    assert store.read(fewer, study.arms[0], choice.trial, **final) is None


def test_a_cell_with_another_model_of_the_same_name_runs_again(
    study, finished, tmp_path, checkpoint
):
    store, _, _ = finished
    (task,) = study.tasks
    arguments, names = place(study, study.arms[0])
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    config = ConfigDict(task.config.to_dict())
    config.model.path = str(other)
    moved = dataclasses.replace(task, config=config)
    cell = store.read(moved, *arguments[1:], **names)
    assert {*cell["source"]} == {"model", "data"}, "the location does not matter"
    changed = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(changed))
    _fingerprint.cache_clear()
    assert store.read(moved, *arguments[1:], **names) is None
    # A cell of a model on the hub has no fingerprints, and is accepted.
    older = Store(tmp_path / "older")
    older.write(task, study.arms[0], {k: v for k, v in cell.items() if k != "source"}, final=False)
    assert older.read(moved, *arguments[1:], **names) is not None


def test_arms_are_timed_in_turns(study, finished):
    store, _, _ = finished
    (task,) = study.tasks
    seconds = store.read_timing(task, study.arms)
    assert list(seconds) == [arm.name for arm in study.arms]
    for cost in seconds.values():
        assert len(cost.rounds) == ROUNDS
        assert 0 < min(cost.rounds) <= cost.seconds <= max(cost.rounds)
        assert cost.step_bytes > 1000
    assert store.read_timing(task, study.arms[:2]) is None


def test_trials_are_chosen_on_tuning_rows(study, finished):
    store, _, _ = finished
    (task,) = study.tasks
    for arm in study.arms:
        tuning = [
            json.loads(file.read_text())
            for file in store.path(task, arm, Trial(1.0), seed=0, final=False).parent.glob("tune*")
        ]
        assert all("row_losses" not in cell for cell in tuning)
        best = min(tuning, key=lambda cell: cell["loss"])
        entry = analyze(study, store).entries["words"][arm.name]
        assert entry.choice.trial == Trial(best["learning_rate"], best["attention_scale"])
        assert entry.choice.trials == len(tuning)
        assert all(cell["learning_rate"] == best["learning_rate"] for cell in entry.cells)
        assert [cell["seed"] for cell in entry.cells] == [1, 2]
        assert len(entry.cells[0]["row_losses"]) == 12


def test_a_measured_cell_has_a_curve_and_short_series(study, finished):
    store, _, _ = finished
    entry = analyze(study, store).entries["words"]["both"]
    for cell in entry.cells:
        assert cell["curve"]["steps"] == [2, 4]
        assert all(loss > 0 for loss in cell["curve"]["losses"])
        steps = cell["steps"]
        assert steps["taken"] == 4
        assert len(steps["train_loss"]) == 4 <= PARTS
        assert set(steps["clipped"]) == {"low_rank", "rotation"}
        assert len(steps["lambda"]["layers"]["by_layer"]) == 1
        assert 0 <= cell["calibration"]["ece"] <= 1


def test_all_arms_see_the_same_batches(study, bench):
    (task,) = study.tasks
    other = Bench(task, study.arms[2])
    for a, b in zip(bench.batches(1), other.batches(1), strict=True):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_a_seed_draws_the_order_and_the_start(study, bench):
    arm = study.arms[0]
    assert not np.array_equal(bench.batches(1)[0].tokens, bench.batches(2)[0].tokens)
    configs = [study.tasks[0].run_config(arm, Trial(1e-3), seed=seed) for seed in (1, 2)]
    starts = [flatten(bench.initialize(arm, config).constant) for config in configs]
    for path, array in starts[0].items():
        assert not np.allclose(array, starts[1][path]), path


def test_the_sketch_of_the_gradient_is_drawn_by_the_seed(study, bench):
    """With the same batches, another seed still gives another start."""
    arm = study.arms[0]
    config = study.tasks[0].run_config(arm, Trial(1e-3), seed=1)
    params = bench.params(1)
    blueprint = bench.blueprint(arm, config)
    batches = blueprint.init_microbatches(bench.batches(1)[: blueprint.init_batches])
    found = [blueprint.start_factors(jax.random.key(seed), params, batches) for seed in (1, 2)]
    kernels = [jax.tree.leaves(factors) for factors in found]
    assert any(not np.allclose(a, b, atol=1e-7) for a, b in zip(*kernels, strict=True))


def test_facts_count_rows_and_text(study, finished):
    store, _, _ = finished
    (task,) = study.tasks
    facts = store.read_facts(task, facts_digest(study, task))
    assert facts["rows"]["test"]["used"] == 12
    assert facts["rows"]["tuning"]["used"] == 16
    assert facts["text"]["lost"] == 0
    assert facts["base_loss"] == pytest.approx(np.log(24), abs=0.5), "a random model"
    assert not facts["four_bit"]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 2], ids=["lora_ga", "hybrid"])
@pytest.mark.parametrize("final", [False, True])
def test_a_cell_trains_like_a_run(index, final, study, tmp_path):
    """Rates in the state, shared programs and shared starts change no result."""
    (task,) = study.tasks
    arm = study.arms[index]
    bench = Bench(task, arm)
    train_cell(bench, arm, Trial(1e-3, 1.0), seed=0, final=not final)
    trial = Trial(1e-2, 4.0)
    cell = train_cell(bench, arm, trial, seed=1, final=final)
    config = task.run_config(arm, trial, seed=1, final=final)
    run(config, tmp_path / "run")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    train = [record for record in records if record["split"] == "train"]
    assert len(train) == (4 if final else 2)
    if not final:
        after = [record["loss"] for record in records if record["split"] != "train"][-1]
        assert cell["loss"] == pytest.approx(after, rel=2e-4)
        return
    losses = [record["loss"] for record in train]
    np.testing.assert_allclose(cell["steps"]["train_loss"], losses, rtol=5e-4)
    if index == 2:
        found = [np.mean(record["lambda"]["layers"]) for record in train]
        np.testing.assert_allclose(cell["steps"]["lambda"]["layers"]["mean"], found, rtol=1e-3)


def test_the_page_shows_the_measurements_of_the_cells(study, finished, tmp_path):
    store, _, _ = finished
    text = write_page(study, store, tmp_path).read_text()
    assert "All 18 cells are done." in text
    analysis = analyze(study, store)
    for entry in analysis.entries["words"].values():
        losses = [cell["loss"] for cell in entry.cells]
        assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in text
        assert f"{entry.seconds:.3f}" in text
    contrast = analysis.contrasts["words"]
    assert contrast.branch in ("low", "turn")
    names = ("both", contrast.branch)
    losses = [analysis.entries["words"][name].loss for name in names]
    assert contrast.comparison.difference == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert f"{contrast.comparison.difference:+.4f} [" in text
    for picture in ("curves", "lambda", "gradients"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 3000
        assert f"({picture}.png)" in text


@pytest.fixture(scope="module")
def labeled(study, tmp_path_factory):
    """Returns a task with two labels for the same language model."""
    folder = tmp_path_factory.mktemp("labeled")
    generator = np.random.default_rng(1)
    for name, count in (("train", 40), ("test", 9)):
        lines = ["sentence\tlabel"]
        for at in generator.integers(0, len(WORDS), count):
            lines.append(f"{WORDS[at]} {WORDS[(at + 3) % len(WORDS)]}\t{at % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    config = ConfigDict(study.tasks[0].config.to_dict())
    config.data.recipe = "sst2"
    config.data.path = str(folder)
    config.data.prompt_template = "{sentence}"
    config.data.completion_template = " {label}"
    config.data.label_words = ("w0 w1", "w2")
    config.data.hold_out = 8
    config.train.max_length = 8
    return dataclasses.replace(study.tasks[0], config=config, metric="accuracy")


@pytest.mark.slow
def test_a_language_models_labels_are_measured(study, labeled):
    """Compares choices and calibration with full logits."""
    arm = study.arms[1]
    bench = Bench(labeled, arm)
    config = labeled.run_config(arm, Trial(1e-2), seed=1)
    adapter = bench.spec(config).init(jax.random.key(1), bench.params(1))
    noisy = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), adapter.trainable
    )
    adapter = dataclasses.replace(adapter, trainable=noisy)
    measured = bench.measure(arm, config, adapter, "test")
    merged = bench.spec(config).merge(bench.params(1), adapter)
    data = bench.held_out["test"]

    logits_of = jax.jit(lambda ids: bench.model(merged, ids[None])[0])

    def log_probabilities(ids):
        logits = np.asarray(logits_of(jax.numpy.asarray(ids[:-1])), np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    right, confidence, correct = [], [], []
    for example in data.examples:
        prompt = data.encoder.prompt_ids(example)
        scores = []
        for label, choice in enumerate(data.encoder.choice_ids(example)):
            ids = np.concatenate([prompt, choice])
            logs = log_probabilities(ids)
            places = range(len(prompt), len(ids))
            scores.append(sum(logs[at - 1, ids[at]] for at in places))
            if label == example.label:
                # The targets of the row: the answer, and the end of the text.
                ids = np.concatenate([ids, [bench.tokenizer.eos_token_id, 0]])
                logs = log_probabilities(ids)
                for at in range(len(prompt), len(ids) - 1):
                    confidence.append(np.exp(logs[at - 1].max()))
                    correct.append(logs[at - 1].argmax() == ids[at])
        right.append(int(np.argmax(scores)) == example.label)
    assert len(right) == 9
    assert 0 < sum(right) < 9
    assert measured.measures["accuracy"] == pytest.approx(np.mean(right))
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    bins = (confidence * 15).astype(int)
    expected = sum(
        abs(confidence[bins == b].sum() - correct[bins == b].sum()) for b in range(15)
    ) / len(bins)
    assert measured.calibration["accuracy"] == pytest.approx(correct.mean())
    assert measured.calibration["ece"] == pytest.approx(expected, abs=1e-5)


def test_an_unknown_metric_is_rejected_before_training(study, labeled):
    with pytest.raises(ValueError, match=r"metric is 'acuracy', but the metrics .* accuracy"):
        Bench(dataclasses.replace(labeled, metric="acuracy"), study.arms[0])
    with pytest.raises(ValueError, match=r"metric is 'accuracy', but .* are none"):
        Bench(dataclasses.replace(study.tasks[0], metric="accuracy"), study.arms[0])


@pytest.mark.parametrize("by_seed", [False, True])
def test_seeds_can_have_different_rows(study, by_seed):
    task = study.tasks[0]
    config = ConfigDict(task.config.to_dict())
    config.data.train_rows = 12
    config.data.train_rows_by_seed = by_seed
    config.train.steps = 3
    bench = Bench(dataclasses.replace(task, config=config), study.arms[0])
    rows = {
        seed: sorted(row.tobytes() for batch in bench.batches(seed) for row in batch.tokens)
        for seed in study.seeds
    }
    assert (rows[1] != rows[2]) == by_seed


def test_arms_of_other_sizes_than_the_budget_are_rejected(study, tmp_path):
    arms = tuple(dataclasses.replace(arm, at_budget=True) for arm in study.arms)
    message = r"low 1\d\d, turn \d+, both \d+ trainable parameters, .* within 1%"
    said = []
    with pytest.raises(ValueError, match=message):
        run_study(
            dataclasses.replace(study, arms=arms), Store(tmp_path), only="/low", say=said.append
        )
    assert not said


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_a_truncated_cell_is_rejected_by_name(study, tmp_path, text):
    store = Store(tmp_path)
    (task,) = study.tasks
    arguments, names = place(study, study.arms[0])
    file = store.path(*arguments, **names)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(RefusedError, match=r"tune-0.001-x1.json is not a cell of a study"):
        store.read(*arguments, **names)
    file.write_text(json.dumps({"digest": store._digest(*arguments, **names), "loss": 1.0}))
    with pytest.raises(RefusedError, match=r"it lacks attention_scale, diverged, learning_rate"):
        store.read(*arguments, **names)
    store.timing_path(task).write_text(text)
    with pytest.raises(RefusedError, match=r"timing.json is not a study's timing"):
        store.read_timing(task, study.arms)
    store.facts_path(task).write_text(text)
    with pytest.raises(RefusedError, match=r"facts.json is not the facts of a study's task"):
        store.read_facts(task, "")


@pytest.mark.slow
def test_arms_share_the_gradient_of_equal_ranks_on_equal_kernels(study, monkeypatch):
    """Seeds, batches, passes, ranks and kernels each need a gradient of their own."""
    task = study.tasks[0]
    bench = Bench(task, study.arm("low"))
    estimated = []
    original = Blueprint.start_factors

    def counted(self, key, params, batches):
        estimated.append((self.config.seed, len(batches), self.init_passes))
        return original(self, key, params, batches)

    monkeypatch.setattr(Blueprint, "start_factors", counted)

    def start(title, seed=1, **method):
        arm = study.arm(title)
        # Another name, because the bench keeps one program for an arm.
        arm = dataclasses.replace(
            arm, name=f"{title} {sorted(method.items())}", method={**arm.method, **method}
        )
        config = task.run_config(arm, Trial(1e-2), seed=seed)
        return bench.initialize(arm, config).trainable["layers"]

    low, both = start("low"), start("both")
    start("turn")
    assert len(estimated) == 1
    found = both["mlp"]["down_proj"]["kernel"]["low_rank"]["a"]
    np.testing.assert_array_equal(low["mlp"]["down_proj"]["kernel"]["a"], found)
    start("low", alpha=3.0)
    assert len(estimated) == 1
    others = (
        {"seed": 2},
        {"init_batches": 2},
        {"init_passes": 2},
        {"rank": 1},
        {"target_modules": "down_proj"},
    )
    for count, changes in enumerate(others, 2):
        start("low", **changes)
        assert len(estimated) == count, changes
        start("both", **changes)
        assert len(estimated) == count, changes
