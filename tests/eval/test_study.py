"""Tests a small study: its protocol, its cells on disk, and its page."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from scipy import stats

from eval.study.bench import Bench, with_rate
from eval.study.cell import train_cell
from eval.study.command import load_study
from eval.study.page import collect, comparisons, count_finished, write_page
from eval.study.run import choose_rate, count_cells, run_study
from eval.study.settings import ArmSettings, StudySettings, TaskSettings, digest
from eval.study.source import _fingerprint
from eval.study.statistics import compare, holm, mean_and_deviation, sign_flip_p
from eval.study.store import Store
from eval.study.timing import ROUNDS
from peft_jax.optim import MixingSettings, OptimizerSettings, make_optimizer
from peft_jax.training import RefusedError, config_files, run
from peft_jax.training.blueprint import Blueprint
from peft_jax.training.report.metrics import read_records

WORDS = [f"w{number}" for number in range(20)]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SMALL = {"rank": 2, "target_modules": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from peft_jax.hub import save_model
    from peft_jax.models import build_model

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<pad>", "</s>", "<s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = {**LLAMA, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 1}
    model = build_model(config)
    save_model(folder, model, model.init_params(jax.random.key(0)))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Writes rows in which the answer to a word is the second word after it."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    for name, count in (("train", 80), ("test", 12)):
        lines = []
        for at in generator.integers(0, len(WORDS) - 2, count):
            lines.append({"instruction": WORDS[at], "input": "", "output": WORDS[at + 2]})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def study(checkpoint, rows):
    config = config_files.base(method="lora", precision="float32")
    config.model.path = str(checkpoint)
    config.data.recipe = "alpaca"
    config.data.path = str(rows)
    config.data.prompt_template = "{instruction}"
    config.data.completion_template = " {output}"
    config.data.hold_out = 16
    config.data.prefetch = 0
    config.data.packing = False
    config.train.steps = 5
    config.train.batch_size = 4
    config.train.max_length = 4
    config.optimizer.schedule.name = "cosine"
    config.parallel.devices = 1
    task = TaskSettings(
        name="words",
        title="Words",
        config=config,
        test={"eval_split": "test"},
        grids={"low": (1e-3, 1e-2), "turn": (2e-3, 2e-2)},
        own_texts=4,
    )

    def arm(title, /, grid="low", rotation_grid="", **method):
        return ArmSettings(
            name=title, title=title, method=method, grid=grid, rotation_grid=rotation_grid
        )

    return StudySettings(
        name="small",
        title="A small study",
        tasks=(task,),
        arms=(
            arm("low", name="lora_ga", **SMALL),
            arm(
                "turn",
                grid="turn",
                name="boft",
                block_size=4,
                target_modules=SMALL["target_modules"],
            ),
            arm("both", rotation_grid="turn", name="hybrid", block_size=4, **SMALL),
        ),
        hybrid="both",
        branches=("low", "turn"),
        tune_seed=0,
        seeds=(1, 2),
    )


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """Returns a study that was stopped after one arm, and resumed in another order."""
    store = Store(tmp_path_factory.mktemp("study"))
    said: list[str] = []
    run_study(study, store, only="/both$", say=said.append)
    assert len(said) == 4
    run_study(study, store, say=said.append)
    return store, said


def test_every_cell_runs_once(study, finished):
    store, said = finished
    assert count_cells(study) == count_finished(study, store) == 12
    assert len(said) == 12 + 1
    assert said[-1] == "words: timed the steps of 3 arms"
    again: list[str] = []
    run_study(study, store, say=again.append)
    assert again == []


def test_a_cell_with_other_settings_runs_again(study, finished, tmp_path):
    store, _ = finished
    (task,) = study.tasks
    longer = ConfigDict(task.config.to_dict())
    longer.train.steps = 6
    other = dataclasses.replace(task, config=longer)
    place = {"learning_rate": 1e-3, "seed": 0, "final": False}
    assert store.read(task, study.arms[0], **place) is not None
    assert store.read(other, study.arms[0], **place) is None


def test_a_cell_with_another_model_of_the_same_name_runs_again(
    study, finished, tmp_path, checkpoint
):
    store, _ = finished
    (task,) = study.tasks
    place = {"learning_rate": 1e-3, "seed": 0, "final": False}
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    config = ConfigDict(task.config.to_dict())
    config.model.path = str(other)
    moved = dataclasses.replace(task, config=config)
    cell = store.read(moved, study.arms[0], **place)
    assert {*cell["source"]} == {"model", "data"}, "the location does not matter"
    changed = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(changed))
    _fingerprint.cache_clear()
    assert store.read(moved, study.arms[0], **place) is None
    # A cell of an older version has no fingerprints, and is accepted.
    older = Store(tmp_path / "older")
    older.write(task, study.arms[0], {k: v for k, v in cell.items() if k != "source"}, final=False)
    assert older.read(moved, study.arms[0], **place) is not None


@pytest.mark.parametrize(
    ("only", "message"),
    [("words/lora", "the tasks words and the arms low, turn, both"), ("(", "regular expression")],
)
def test_a_pattern_without_matches_is_rejected(study, tmp_path, only, message):
    with pytest.raises(ValueError, match=message):
        run_study(study, Store(tmp_path), only=only)


def test_a_page_is_not_replaced_by_an_empty_one(study, tmp_path):
    write_page(study, Store(tmp_path), tmp_path)
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="no cell of the study is finished"):
        write_page(study, Store(tmp_path), tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_a_file_without_a_study_is_rejected(tmp_path):
    file = tmp_path / "none.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no get_config\(data\)"):
        load_study(file)


def test_mixing_changes_only_the_digest_of_a_hybrid(study):
    (task,) = study.tasks
    for arm in study.arms:
        config = task.run_config(arm, learning_rate=1e-2, seed=1)
        before = digest(config, task)
        object.__setattr__(config, "mixing", MixingSettings(rule="fixed", rotation_rate=2.0))
        assert (digest(config, task) == before) == (arm.method["name"] != "hybrid")


def test_arms_are_timed_in_turns(study, finished):
    store, _ = finished
    (task,) = study.tasks
    seconds = store.read_timing(task, study.arms)
    assert list(seconds) == [arm.name for arm in study.arms]
    assert all(len(rounds) == ROUNDS and min(rounds) > 0 for rounds in seconds.values())
    assert store.read_timing(task, study.arms[:2]) is None


def test_learning_rates_are_chosen_on_tuning_rows(study, finished):
    store, _ = finished
    (task,) = study.tasks
    for arm in study.arms:
        grid = [
            store.read(task, arm, learning_rate=rate, seed=0, final=False)
            for rate in task.rates(arm)
        ]
        entry = collect(study, store)["words"][arm.name]
        best = min(grid, key=lambda cell: cell["loss"])
        assert entry.choice.rate == best["learning_rate"]
        assert all(cell["learning_rate"] == best["learning_rate"] for cell in entry.cells)
        assert [cell["seed"] for cell in entry.cells] == [1, 2]
        assert "row_losses" not in grid[0]
        assert len(entry.cells[0]["row_losses"]) == 12


def test_all_arms_see_the_same_batches_and_measure_the_same_rows(study):
    (task,) = study.tasks
    one, other = Bench(task, study.arms[0]), Bench(task, study.arms[2])
    for a, b in zip(one.batches(1), other.batches(1), strict=True):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
    different = one.batches(2)
    assert not np.array_equal(one.batches(1)[0].tokens, different[0].tokens)
    texts = {
        name: {example.prompt + example.completion for example in one.held_out[name].examples}
        for name in ("tuning", "test")
    }
    assert all(texts.values())


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 2], ids=["lora_ga", "hybrid"])
def test_a_cell_trains_like_a_run(index, study, tmp_path):
    """A learning rate in the state, shared programs and shared starts change no result."""
    (task,) = study.tasks
    arm = study.arms[index]
    bench = Bench(task, arm)
    train_cell(bench, arm, learning_rate=1e-3, seed=0, final=False)
    cell = train_cell(bench, arm, learning_rate=1e-2, seed=1, final=True)
    config = task.run_config(arm, learning_rate=1e-2, seed=1)
    run(config, tmp_path / "run")
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    expected = [record["loss"] for record in records]
    np.testing.assert_allclose(cell["train_loss"], expected, rtol=2e-4)
    if index == 2:
        assert np.shape(cell["steps"]["lambda"]["layers"]) == (5, 2)
        found = [record["lambda"]["layers"] for record in records]
        np.testing.assert_allclose(cell["steps"]["lambda"]["layers"], found, rtol=1e-3)


def test_a_learning_rate_in_the_state_matches_a_constant():
    own = {"learning_rates": {"head": 0.2}, "weight_decay": 0.1}
    settings = OptimizerSettings(learning_rate=1.0, **own)
    plain = OptimizerSettings(learning_rate=0.03, **own)
    one = with_rate(make_optimizer(settings, 10), 0.03, settings.learning_rates)
    other = make_optimizer(plain, 10)
    params = {"w": jax.numpy.arange(3.0), "head": {"w": jax.numpy.arange(2.0)}}
    states = [one.init(params), other.init(params)]
    for step in range(3):
        gradients = {
            "w": jax.numpy.asarray([1.0, -2.0, 0.3]) * (step + 1),
            "head": {"w": jax.numpy.asarray([0.5, -1.0])},
        }
        updates = []
        for index, optimizer in enumerate((one, other)):
            found, states[index] = optimizer.update(gradients, states[index], params)
            updates.append(found)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *updates)
        params = optax.apply_updates(params, updates[0])


def test_the_page_shows_the_measurements_of_the_cells(study, finished, tmp_path):
    store, _ = finished
    page = write_page(study, store, tmp_path)
    text = page.read_text()
    assert "All 12 cells are done." in text
    entries = collect(study, store)["words"]
    for entry in entries.values():
        mean = np.mean([cell["loss"] for cell in entry.cells])
        deviation = np.std([cell["loss"] for cell in entry.cells], ddof=1)
        assert f"{mean:.4f} ± {deviation:.4f}" in text
    for rounds in store.read_timing(study.tasks[0], study.arms).values():
        assert f"{np.median(rounds):.3f}" in text
    best, result = comparisons(study, collect(study, store))["words"]
    assert best in ("low", "turn")
    difference = entries["both"].loss - entries[best].loss
    assert result.difference == pytest.approx(difference, abs=1e-4)
    assert f"{result.difference:+.4f}" in text
    for picture in ("losses", "lambda", "gradients"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 3000
        assert f"({picture}.png)" in text


def test_a_page_reports_unfinished_cells(study, finished, tmp_path):
    store, _ = finished
    part = Store(tmp_path / "part")
    (task,) = study.tasks
    for arm in study.arms[:1]:
        for final, seeds in ((False, (0,)), (True, (1, 2))):
            for seed in seeds:
                for rate in task.rates(arm):
                    cell = store.read(task, arm, learning_rate=rate, seed=seed, final=final)
                    if cell is not None:
                        part.write(task, arm, cell, final=final)
    text = write_page(study, part, tmp_path / "page").read_text()
    assert "**Not finished:** 4 of 12 cells are done." in text
    assert "words: turn, both" in text
    assert "not timed" in text
    assert "Not known yet" in text


def test_a_claimed_cell_is_skipped_by_others(study, tmp_path):
    store = Store(tmp_path)
    (task,) = study.tasks
    path = store.path(task, study.arms[0], learning_rate=1e-3, seed=0, final=False)
    with store.claim(path) as mine:
        assert mine
        with Store(tmp_path).claim(path) as other:
            assert not other
    with store.claim(path) as mine:
        assert mine


def test_the_rate_with_the_lowest_loss_is_chosen():
    rates = (1.0, 2.0, 3.0)

    def cells(*losses):
        return [{"loss": loss} for loss in losses]

    assert choose_rate(rates, cells(3.0, 1.0, None)).rate == 2.0
    assert not choose_rate(rates, cells(3.0, 1.0, None)).at_edge
    assert choose_rate(rates, cells(0.5, 1.0, None)).at_edge
    assert choose_rate(rates, cells(None, None, None)) is None


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
def test_the_permutation_test_agrees_with_scipy(shift):
    differences = np.random.default_rng(3).normal(shift, 1.0, 40)
    expected = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected, abs=0.015)


def test_the_permutation_test_keeps_its_level():
    """Of 200 tests without a difference, about one in twenty is below 0.05."""
    generator = np.random.default_rng(0)
    found = [sign_flip_p(generator.normal(size=15), rounds=500) for _ in range(200)]
    assert 0.01 <= np.mean(np.asarray(found) < 0.05) <= 0.1


def test_holm_correction_and_deviation():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    mean, deviation = mean_and_deviation([1.0, 3.0, 5.0])
    assert (mean, deviation) == (3.0, 2.0)


def test_arms_are_compared_only_on_the_same_rows():
    cell = {"seed": 1, "loss": 1.0, "row_losses": [1.0, 1.0], "row_targets": [1, 1]}
    with pytest.raises(ValueError, match="same seeds"):
        compare([cell], [{**cell, "seed": 2}])
    with pytest.raises(ValueError, match="same rows"):
        compare([cell], [{**cell, "row_targets": [1, 2]}])
    result = compare([cell], [{**cell, "loss": 2.0, "row_losses": [2.0, 2.0]}])
    assert (result.difference, result.seeds_ahead) == (-1.0, 1)


def test_each_branch_has_a_learning_rate_of_its_grid(study):
    (task,) = study.tasks
    both = study.arm("both")
    config = task.run_config(both, learning_rate=task.rates(both)[1], seed=1)
    assert config.optimizer.learning_rate == 1e-2
    assert config.mixing.rotation_rate == 2.0
    other = task.run_config(study.arm("low"), learning_rate=1e-2, seed=1)
    assert other.mixing.rotation_rate == 1.0


def test_a_task_may_have_a_subset_of_the_arms(study, finished, tmp_path):
    store, _ = finished
    few = dataclasses.replace(study.tasks[0], arms=("both", "low"))
    fewer = dataclasses.replace(study, tasks=(few,))
    assert [arm.name for arm in fewer.arms_of(few)] == ["low", "both"]
    assert count_cells(fewer) == count_finished(fewer, store) == 8
    assert set(collect(fewer, store)["words"]) == {"low", "both"}
    text = write_page(fewer, store, tmp_path).read_text()
    assert "All 8 cells are done." in text
    assert "| turn |  |" in text
    with pytest.raises(ValueError, match="no arm 'lo'"):
        dataclasses.replace(study, tasks=(dataclasses.replace(few, arms=("lo",)),))


def test_a_missing_metric_is_not_shown_as_diverged(study, finished, tmp_path):
    store, _ = finished
    task = dataclasses.replace(study.tasks[0], metric="accuracy")
    text = write_page(dataclasses.replace(study, tasks=(task,)), store, tmp_path).read_text()
    assert "| method | test loss | accuracy |" in text
    assert text.count("not measured") == 3
    assert "diverged" not in text


def test_a_study_needs_no_hybrid(study, finished, tmp_path):
    store, _ = finished
    plain = dataclasses.replace(study, arms=study.arms[:2], hybrid="", branches=())
    text = write_page(plain, store, tmp_path).read_text()
    assert "All 8 cells are done." in text
    assert "hybrid" not in text
    assert "(losses.png)" in text
    for settings, message in (
        ({"hybrid": ""}, "hybrid is empty, but branches is"),
        ({"hybrid": "low"}, "is the arm 'low', whose method is 'lora_ga'"),
        ({"branches": ()}, "branches is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(study, **settings)


def test_a_page_is_written_for_a_hybrid_that_diverged(study, finished, tmp_path):
    """Covers divergence in one seed, after some steps, and in all seeds."""
    store, _ = finished
    (task,) = study.tasks
    changed = Store(tmp_path)
    for arm in study.arms:
        for final, seeds in ((False, (0,)), (True, (1, 2))):
            for seed in seeds:
                for rate in task.rates(arm):
                    place = {"learning_rate": rate, "seed": seed, "final": final}
                    cell = store.read(task, arm, **place)
                    if cell is not None:
                        changed.write(task, arm, cell, final=final)
    hybrid = study.arm("both")
    entry = collect(study, store)["words"]["both"]
    for cell in entry.cells:
        steps = cell["steps"]
        gone = {
            **cell,
            "diverged": True,
            "loss": None,
            "row_losses": [None] * len(cell["row_losses"]),
            "forgetting": None,
            "steps": {
                **steps,
                "grad_norm": steps["grad_norm"][:2],
                "lambda": {"layers": steps["lambda"]["layers"][:2]},
            },
        }
        changed.write(task, hybrid, gone, final=True)
        text = write_page(study, changed, tmp_path / "page").read_text()
        assert "diverged" in text
        assert "Not known yet: on no task are the hybrid" in text
        assert "(lambda.png)" not in text
    row = next(line for line in text.splitlines() if line.startswith("| both | "))
    assert row.count("diverged") == 2


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


def test_a_language_models_labels_are_measured(study, labeled):
    """Compares with full logits of each choice."""
    arm = study.arm("both")
    bench = Bench(labeled, arm)
    config = labeled.run_config(arm, learning_rate=1e-2, seed=1)
    adapter = bench.initialize(arm, config)
    noisy = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), adapter.trainable
    )
    adapter = dataclasses.replace(adapter, trainable=noisy)
    measured = bench.measure(arm, config, adapter, "test")
    merged = bench.spec(config).merge(bench.params(1), adapter)
    data = bench.held_out["test"]
    right = []
    for example in data.examples:
        prompt = data.encoder.prompt_ids(example)
        scores = []
        for choice in data.encoder.choice_ids(example):
            ids = np.concatenate([prompt, choice])
            logits = np.asarray(bench.model(merged, jax.numpy.asarray(ids[None, :-1])), np.float64)[
                0
            ]
            logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            scores.append(sum(logs[at - 1, ids[at]] for at in range(len(prompt), len(ids))))
        right.append(int(np.argmax(scores)) == example.label)
    assert len(right) == 9
    assert 0 < sum(right) < 9
    assert measured.measures["accuracy"] == pytest.approx(np.mean(right))


def test_an_unknown_metric_is_rejected_before_training(study, labeled):
    with pytest.raises(ValueError, match=r"metric is 'acuracy', but the metrics .* accuracy"):
        Bench(dataclasses.replace(labeled, metric="acuracy"), study.arms[0])
    with pytest.raises(ValueError, match=r"metric is 'accuracy', but .* are none"):
        Bench(dataclasses.replace(study.tasks[0], metric="accuracy"), study.arms[0])


@pytest.mark.parametrize("by_seed", [False, True])
def test_seeds_can_have_different_rows(study, tmp_path, by_seed):
    task = study.tasks[0]
    config = ConfigDict(task.config.to_dict())
    config.data.train_rows = 12
    config.data.train_rows_by_seed = by_seed
    config.train.steps = 3
    task = dataclasses.replace(task, config=config)
    bench = Bench(task, study.arms[0])
    rows = {
        seed: sorted(row.tobytes() for batch in bench.batches(seed) for row in batch.tokens)
        for seed in study.seeds
    }
    assert (rows[1] != rows[2]) == by_seed
    text = write_page(dataclasses.replace(study, tasks=(task,)), Store(tmp_path), tmp_path)
    whose = "different for each seed" if by_seed else "the same for all seeds"
    assert f"from 12 training rows, {whose}." in text.read_text()


def test_unfair_settings_are_rejected(study):
    task = study.tasks[0]
    with pytest.raises(ValueError, match="the same number"):
        dataclasses.replace(task, grids={"low": (1.0, 2.0, 3.0), "turn": (1.0, 2.0)})
    with pytest.raises(ValueError, match="must be increasing"):
        dataclasses.replace(task, grids={"low": (2.0, 1.0)})
    bent = dataclasses.replace(task, grids={"low": (1.0, 2.0), "turn": (1.0, 3.0)})
    with pytest.raises(ValueError, match="must be constant"):
        dataclasses.replace(study, tasks=(bent,))
    without = dataclasses.replace(task, grids={"low": (1.0, 2.0)})
    with pytest.raises(ValueError, match="no grid 'turn'"):
        dataclasses.replace(study, tasks=(without,))
    with pytest.raises(ValueError, match="among the seeds"):
        dataclasses.replace(study, tune_seed=1)
    with pytest.raises(ValueError, match="no arm"):
        dataclasses.replace(study, hybrid="neither")
    config = ConfigDict(study.tasks[0].config.to_dict())
    config.data.hold_out = None
    with pytest.raises(ValueError, match="hold_out"):
        dataclasses.replace(study.tasks[0], config=config)


def test_the_committed_study_is_well_formed():
    file = Path(__file__).parents[2] / "configs" / "study_cpu.py"
    for data in ("", "/data"):
        study = load_study(file, data)
        for task in study.tasks:
            for arm in study.arms:
                config = task.run_config(arm, learning_rate=task.rates(arm)[0], seed=1)
                assert config.spec.method.name == arm.method["name"]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_a_truncated_cell_is_rejected_by_name(study, tmp_path, text):
    store = Store(tmp_path)
    (task,) = study.tasks
    place = {"learning_rate": 1e-3, "seed": 0, "final": False}
    file = store.path(task, study.arms[0], **place)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(RefusedError, match=r"tune-0.001.json is not a cell of a study"):
        store.read(task, study.arms[0], **place)
    config = task.run_config(study.arms[0], learning_rate=1e-3, seed=0)
    file.write_text(json.dumps({"digest": digest(config, task), "loss": 1.0}))
    with pytest.raises(RefusedError, match=r"it lacks diverged, learning_rate, measures"):
        store.read(task, study.arms[0], **place)
    store.timing_path(task).write_text(text)
    with pytest.raises(RefusedError, match=r"timing.json is not a study's timing"):
        store.read_timing(task, study.arms)


def test_arms_share_the_gradient_of_equal_ranks_on_equal_kernels(study, monkeypatch):
    """Seeds, batches, passes, ranks and kernels each need a gradient of their own."""
    task = study.tasks[0]
    bench = Bench(task, study.arm("low"))
    estimated = []
    original = Blueprint.gradient_factors

    def counted(self, key, params, batches):
        estimated.append((self.config.seed, len(batches), self.init_passes))
        return original(self, key, params, batches)

    monkeypatch.setattr(Blueprint, "gradient_factors", counted)

    def start(title, seed=1, **method):
        arm = study.arm(title)
        # Another name, because the bench keeps one program for an arm.
        arm = dataclasses.replace(
            arm, name=f"{title} {sorted(method.items())}", method={**arm.method, **method}
        )
        config = task.run_config(arm, learning_rate=1e-2, seed=seed)
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
