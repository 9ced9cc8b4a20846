"""Tests complete runs: their files, and that a resumed run equals an uninterrupted one."""

import hashlib
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import method_settings
from peft_jax.data import TrainData
from peft_jax.hub import load_adapter, load_model
from peft_jax.training import (
    BadDataError,
    InterruptedRunError,
    NonFiniteError,
    RefusedError,
    TrainStep,
    run,
)
from peft_jax.training.report.metrics import read_records
from peft_jax.training.step import summed_loss

METHODS = ("full", "lora", "lora_ga", "boft", "unitary", "hybrid")
SMALL = {"rank": 2, "block_size": 4}


def small(name: str) -> dict:
    """Returns a method's settings for the tiny model."""
    return {f"method.{k}": v for k, v in SMALL.items() if k in method_settings(name)}


def untimed(workdir):
    """Returns the records of a run without timings."""
    return [
        {name: value for name, value in record.items() if name != "timing"}
        for record in read_records(workdir / "metrics.jsonl")
    ]


def adapter_bytes(workdir):
    return (workdir / "adapter" / "peft_jax_adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def base_files(checkpoint):
    """Returns the content of the base model's files before any run."""
    return {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tiny, base_files, tmp_path_factory):
    """Returns a finished run with the hybrid, dropout, accumulation and evaluations."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    summary = run(hybrid(tiny), workdir)
    return workdir, summary


def forget(checkpoint, *names):
    """Removes entries of a checkpoint that earlier versions did not write."""
    file, manifest = checkpoint / "run" / "metadata", checkpoint / "manifest.json"
    saved = json.loads(file.read_text())
    for name in names:
        del saved[name]
    file.write_text(json.dumps(saved))
    listed = json.loads(manifest.read_text())
    content = file.read_bytes()
    listed["run/metadata"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest.write_text(json.dumps(listed))


def hybrid(tiny, **changes):
    settings = {
        "method.name": "hybrid",
        "method.dropout": 0.1,
        "mixing.rule": "proportional",  # which can be checked from what is logged
        "train.gradient_accumulation": 2,
        "evaluate.every": 3,
        "optimizer.schedule.warmup_steps": 2,
        **small("hybrid"),
    }
    return tiny(**(settings | changes))


def test_run_writes_its_files(finished):
    workdir, summary = finished
    present = {path.name for path in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "adapter", "summary.json"} < present
    pictures = {path.name for path in (workdir / "report").iterdir()}
    wanted = {"README.md", "loss.png", "learning_rate.png", "gradients.png", "lambda.png"}
    clipped = {"clipping.png"} if any(summary["clipped"].values()) else set()
    assert pictures == wanted | clipped
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["steps"] == 6
    # The first step comes after preparing, loading, initializing and compiling.
    records = read_records(workdir / "metrics.jsonl")
    first = next(r for r in records if r["split"] == "train")
    waited = first["timing"]["seconds_to_first_step"]
    assert summary["seconds_to_first_step"] == waited
    spent = summary["seconds"]
    assert waited > spent["load"] + spent["initialize"] + spent["compile"]
    page = (workdir / "report" / "README.md").read_text()
    assert f"{summary['loss_after']:.5g}" in page


def test_every_step_has_one_record(finished):
    workdir, summary = finished
    records = untimed(workdir)
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["split"] == "held_out"] == [0, 3, 6]
    train = [r for r in records if r["split"] == "train"]
    for record in train:
        weights = record["lambda"]["layers"]
        assert len(weights) == 2
        assert all(0 < weight < 1 for weight in weights)
        norms = record["grad_norm_by_layer"]
        whole = np.sqrt(sum(np.square(norms[branch]).sum() for branch in norms))
        np.testing.assert_allclose(record["grad_norm"], whole, rtol=1e-5)
        for branch, factor in record["clip_factor"].items():
            own = np.linalg.norm(norms[branch])
            np.testing.assert_allclose(factor, min(1.0, 1.0 / own), rtol=1e-4)
        # Recomputes the paper's rule from logged norms.
        low, rotation = np.array(norms["low_rank"]), np.array(norms["rotation"])
        np.testing.assert_allclose(weights, low / (low + rotation), rtol=1e-5)
    np.testing.assert_allclose(train[0]["learning_rate"], 0.02 / 3, rtol=1e-6)
    for branch, share in summary["clipped"].items():
        clipped = [record["clip_factor"][branch] < 1 for record in train]
        assert share == train[-1]["clipped"][branch] == pytest.approx(np.mean(clipped), abs=1e-6)


def test_exported_adapter_reproduces_the_held_out_loss(finished, tiny, checkpoint):
    from peft_jax.data import build_data
    from peft_jax.hub.tokenizer import load_tokenizer

    workdir, summary = finished
    model, params = load_model(checkpoint)
    spec, adapter = load_adapter(workdir / "adapter", model, params)
    start = adapter.constant["layers"]["mlp"]["down_proj"]["kernel"]["low_rank"]["a0"]
    end = adapter.trainable["layers"]["mlp"]["down_proj"]["kernel"]["low_rank"]["a"]
    assert np.abs(np.asarray(end - start)).max() > 1e-3
    config = hybrid(tiny)
    _, held_out = build_data(
        config.data, load_tokenizer(workdir / "adapter"), batch_size=4, max_length=16, seed=0
    )
    bound, total, count = spec.merge(params, adapter), 0.0, 0.0
    for batch in held_out:
        loss, weight = summed_loss(model, bound, jax.tree.map(jnp.asarray, batch), chunk_size=16)
        total, count = total + float(loss), count + float(weight)
    np.testing.assert_allclose(summary["loss_after"], total / count, rtol=1e-4)


def test_finished_run_is_not_repeated(finished, tiny, listener):
    workdir, summary = finished
    before = adapter_bytes(workdir)
    again = run(hybrid(tiny), workdir, reporter=listener)
    assert again == json.loads(json.dumps(summary))
    assert "finished" in listener.text
    assert adapter_bytes(workdir) == before


class StopAt:
    """Sends a signal to this process at the start of a step's batch."""

    def __init__(self, monkeypatch, step, number):
        real, taken = TrainData.__next__, [0]

        def counted(data):
            taken[0] += 1
            if taken[0] == step:
                os.kill(os.getpid(), number)
            return real(data)

        monkeypatch.setattr(TrainData, "__next__", counted)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_run_resumed_after_a_signal_equals_an_uninterrupted_one(
    finished, tiny, tmp_path, monkeypatch, listener, number
):
    reference, _ = finished
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        StopAt(patch, 6, number)  # the gradient's start takes two batches, so this is step 4
        with pytest.raises(InterruptedRunError, match="after step 4 of 6") as stopped:
            run(hybrid(tiny), workdir, reporter=listener)
    assert stopped.value.exit_code == 128 + number
    assert not (workdir / "summary.json").exists()
    run(hybrid(tiny), workdir, reporter=listener)
    assert "resuming from step 4 of 6" in listener.text
    assert adapter_bytes(workdir) == adapter_bytes(reference)
    assert untimed(workdir) == untimed(reference)


EPOCHS = {
    "train.steps": None,
    "train.epochs": 1.5,
    "train.batch_size": 10,
    "data.packing": False,
    "data.train_rows": 40,
    "optimizer.schedule.name": "linear",
    "optimizer.schedule.warmup_ratio": 0.3,
}
"""One and a half epochs of 40 rows in batches of 10."""


def test_epochs_are_trained_and_reported(tiny, tmp_path, listener):
    whole = run(tiny(**EPOCHS), tmp_path / "whole", reporter=listener)
    assert whole["steps"] == 6
    assert whole["data"]["epochs"] == whole["data"]["passes"] == 1.5
    assert whole["data"]["train"]["used"] == 40
    assert "40 of the 96 in" in listener.text
    assert "6 steps of 10 rows: 1.5 passes over the training rows" in listener.text
    rates = [r["learning_rate"] for r in untimed(tmp_path / "whole") if r["split"] == "train"]
    expected = np.array([1, 2, 3, 3 * 0.75, 3 * 0.5, 3 * 0.25]) / 150
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    page = (tmp_path / "whole" / "report" / "README.md").read_text()
    assert "The run makes 1.5 passes over its rows." in page


@pytest.mark.slow
def test_epochs_are_resumed(tiny, tmp_path, monkeypatch, listener):
    run(tiny(**EPOCHS), tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAt(patch, 4, signal.SIGTERM)
        with pytest.raises(InterruptedRunError, match="after step 4 of 6"):
            run(tiny(**EPOCHS), tmp_path / "stopped")
    run(tiny(**EPOCHS), tmp_path / "stopped", reporter=listener)
    assert "resuming from step 4 of 6" in listener.text
    stopped, finished = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("stopped", "whole")
    )
    assert stopped == finished
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_run_of_one_step_has_no_warmup(tiny, tmp_path):
    changes = {"train.steps": 1, "optimizer.schedule.warmup_ratio": 0.03}
    run(tiny(**changes), tmp_path / "run")
    [record] = [r for r in untimed(tmp_path / "run") if r["split"] == "train"]
    assert record["learning_rate"] == pytest.approx(0.02)


def test_base_model_is_never_written(finished, base_files, checkpoint):
    stored = sum(
        p.stat().st_size
        for p in (finished[0] / "checkpoints").rglob("*")
        if p.is_file() and "arrays" in p.parts
    )
    assert stored > 0
    assert {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()} == base_files


@pytest.mark.slow
def test_merged_model_keeps_its_end_tokens(checkpoint, tiny, tmp_path):
    base, ends = tmp_path / "base", '{"eos_token_id": [1, 5]}'
    shutil.copytree(checkpoint, base)
    (base / "generation_config.json").write_text(ends)
    changes = {"model.path": str(base), "export.merged": True, "train.steps": 1}
    # Simulates killed processes, one with the same id, as happens in containers.
    (tmp_path / "run" / f".model.{os.getpid()}.tmp" / "half").mkdir(parents=True)
    for left in (".model.1.tmp", ".model.2.old", ".adapter.1.tmp"):
        (tmp_path / "run" / left / "half").mkdir(parents=True)
    run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "model" / "half").exists()
    assert not list((tmp_path / "run").glob(".*.*.*"))
    assert (tmp_path / "run" / "model" / "generation_config.json").read_text() == ends


@pytest.fixture
def stopped(finished, tiny, tmp_path):
    """Returns the finished run's folder as of a process killed after step 5."""
    workdir = tmp_path / "killed"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    for name in ("adapter", "report", "checkpoints/6"):
        shutil.rmtree(workdir / name)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    (workdir / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 6, "sp')
    return workdir


def test_run_killed_between_checkpoints_resumes(finished, stopped, tiny, listener):
    run(hybrid(tiny), stopped, reporter=listener)
    assert "resuming from step 4" in listener.text
    assert adapter_bytes(stopped) == adapter_bytes(finished[0])
    assert untimed(stopped) == untimed(finished[0])


@pytest.mark.slow
def test_missing_initial_metric_is_reported_as_not_measured(stopped, tiny, listener):
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"held_out"' not in line]
    (stopped / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    forget(stopped / "checkpoints" / "4", "held_out", "records")
    run(hybrid(tiny), stopped, reporter=listener)
    assert "held-out loss: not measured -> " in listener.text


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped(finished, stopped, tiny, listener):
    target = max(
        (p for p in (stopped / "checkpoints" / "4" / "arrays").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    target.write_bytes(target.read_bytes()[:-7])
    run(hybrid(tiny), stopped, reporter=listener)
    assert "damaged" in listener.text
    assert "resuming from step 2" in listener.text
    assert adapter_bytes(stopped) == adapter_bytes(finished[0])
    assert untimed(stopped) == untimed(finished[0])


def test_damaged_line_of_metrics_is_rejected_before_training(stopped, tiny):
    metrics = stopped / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    metrics.write_text("\n".join([first, "{broken", *others]) + "\n")
    with pytest.raises(RefusedError, match=r"metrics\.jsonl:2 .*remove the line"):
        run(hybrid(tiny), stopped)


def test_resuming_with_other_settings_is_rejected_by_name(stopped, tiny):
    with pytest.raises(RefusedError) as refused:
        run(hybrid(tiny, seed=1, **{"train.learning_rate": 0.5}), stopped)
    message = str(refused.value)
    assert "seed: 0 there, 1 now" in message
    assert "train.learning_rate: 0.02 there, 0.5 now" in message
    assert "batch_size" not in message


@pytest.mark.slow
def test_unusable_row_can_be_skipped_on_resuming(tiny, data, tmp_path, listener):
    words = tmp_path / "words"
    shutil.copytree(data / "words", words)
    lines = (words / "train.jsonl").read_text().splitlines()
    (words / "train.jsonl").write_text("\n".join([*lines[:12], "{", *lines[12:]]) + "\n")
    late = {"data.check_rows": 0, "data.shuffle": False, "data.packing": False}
    late["data.path"] = str(words)
    with pytest.raises(BadDataError) as stopped:
        run(tiny(**late), tmp_path / "run")
    assert "train.jsonl:13: broken JSON" in str(stopped.value)
    assert f"resumes from {tmp_path / 'run' / 'checkpoints' / '2'}" in str(stopped.value)
    late["data.on_bad_row"] = "skip"
    run(tiny(**late), tmp_path / "run", reporter=listener)
    assert "resuming from step 2 of 6" in listener.text
    run(tiny(**late), tmp_path / "whole")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_resuming_with_irrelevant_changes_is_allowed(finished, stopped, tiny, listener):
    run(hybrid(tiny, **{"checkpoint.keep": 5, "logging.every": 2}), stopped, reporter=listener)
    assert "checkpoint.keep was 3 and is 5" in listener.text
    assert adapter_bytes(stopped) == adapter_bytes(finished[0])


def test_results_without_a_configuration_are_not_overwritten(stopped, tiny):
    (stopped / "config.json").unlink()
    with pytest.raises(RefusedError, match=r"no config\.json"):
        run(hybrid(tiny), stopped)


def test_second_run_in_one_folder_is_rejected(stopped, tiny):
    from peft_jax.runtime.files import locked

    with locked(stopped / ".lock"), pytest.raises(RefusedError, match="in use by another run"):
        run(hybrid(tiny), stopped)


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    real, taken = TrainData.__next__, [0]

    def spoilt(data):
        taken[0] += 1
        batch = real(data)
        return batch.replace(loss_mask=batch.loss_mask * np.nan) if taken[0] == 4 else batch

    monkeypatch.setattr(TrainData, "__next__", spoilt)
    with pytest.raises(NonFiniteError) as stopped:
        run(tiny(**{"checkpoint.every": 1}), tmp_path / "run")
    assert "step 4 " in str(stopped.value)
    assert "the loss is nan" in str(stopped.value)
    assert f"last good checkpoint: {tmp_path / 'run' / 'checkpoints' / '3'}" in str(stopped.value)
    records = [r for r in untimed(tmp_path / "run") if r["split"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] is None
    present = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "3" in present
    assert "4" not in present


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "full" else pytest.mark.slow)
        for name in METHODS
        if name not in ("ln_tuning", "trainable_tokens")  # They train other leaves.
    ],
)
def test_every_method_learns_and_compiles_its_step_once(name, tiny, tmp_path, monkeypatch):
    steps = []
    real = TrainStep.__init__

    def remember(self, *args, **kwargs):
        real(self, *args, **kwargs)
        steps.append(self)

    monkeypatch.setattr(TrainStep, "__init__", remember)
    targets = "all-linear" if name == "full" else "q_proj,down_proj"
    config = tiny(
        **{
            "method.name": name,
            "method.target_modules": targets,
            "train.steps": 8,
            **small(name),
        }
    )
    summary = run(config, tmp_path / "run")
    assert [step.traces for step in steps] == [1]
    assert summary["loss_after"] < summary["loss_before"]
    assert (tmp_path / "run" / "model").exists() == (name == "full")


@pytest.mark.slow
def test_several_devices_agree_with_one(tiny, tmp_path):
    alone = run(tiny(), tmp_path / "one")
    shared = run(tiny(**{"parallel.devices": 4, "parallel.fsdp": 2}), tmp_path / "four")
    assert len(jax.devices()) >= 4
    np.testing.assert_allclose(shared["loss_after"], alone["loss_after"], rtol=1e-5)


@pytest.mark.slow
def test_classification_reports_the_preferred_label(tiny, data, tmp_path):
    config = tiny(
        **{
            "method.name": "full",
            "method.target_modules": "all-linear",
            "export.merged": False,
            "data.recipe": "sst2",
            "data.path": str(data / "sentiment"),
            "data.prompt_template": "{sentence}",
            "data.completion_template": " {label}",
            "data.label_words": "bad,good",
            "train.steps": 150,
            "train.batch_size": 16,
            "train.learning_rate": 0.005,
            "checkpoint.every": 0,
        }
    )
    summary = run(config, tmp_path / "run")
    assert summary["before"]["accuracy"] < 1.0
    assert summary["after"]["accuracy"] == 1.0
