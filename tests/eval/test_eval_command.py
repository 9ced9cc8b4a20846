"""`python -m eval`, from end to end on real data, and what it refuses before it does anything."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest

from eval import run
from eval.command import main
from eval.model import HarnessModel
from eval.tasks.names import names_in
from peft_jax.runtime.files import locked


@pytest.fixture
def arguments(checkpoint, shared_data, tmp_path):
    return [f"--model={checkpoint}", f"--data={shared_data}", f"--output={tmp_path / 'out'}"]


def test_results_resumption_and_changes(
    arguments, tmp_path, capsys, monkeypatch, checkpoint, shared_data
):
    tasks = "--tasks=glue,flores_eng_Latn-deu_Latn"
    asked = [*arguments, tasks, "--limit=3", "--max_new_tokens=8", "--devices=1"]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert "3 of 1,043" in shown.out
    assert "3 of 10 tasks" in shown.out
    assert "left out: mrpc, qqp" in shown.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["task"] for one in results["tasks"]] == [
        *("cola", "sst2", "rte"),
        "flores_eng_Latn-deu_Latn",
    ]
    for one in results["tasks"]:
        samples = (tmp_path / "out" / "samples" / f"{one['task']}.jsonl").read_text().splitlines()
        assert len(samples) == 3
        assert all(metric["standard_error"] is not None for metric in one["metrics"])
    assert (tmp_path / "out" / "results.md").read_text() == shown.out
    # Again: nothing is done. With more rows: what was answered is not asked again.
    monkeypatch.setattr(HarnessModel, "_score", lambda *_: pytest.fail("it was scored before"))
    assert main(asked) == 0
    assert capsys.readouterr().out == shown.out
    monkeypatch.undo()
    before = len((tmp_path / "out" / "responses.jsonl").read_text().splitlines())
    assert main([*arguments, "--tasks=cola", "--limit=4", "--devices=1"]) == 0
    assert len((tmp_path / "out" / "responses.jsonl").read_text().splitlines()) == before + 2
    assert "4 of 1,043" in capsys.readouterr().out
    # Another model does not go into the same folder.
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert main([f"--model={other}", *arguments[1:], "--tasks=cola", "--limit=4"]) == 2
    assert "of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tasks="], "no task is named"),
        (["--tasks=gsm8"], "did you mean 'gsm8k'"),
        (["--tasks=mrpc"], "no folder mrpc"),
        (["--tasks=humaneval"], "--allow_code_execution"),
        (["--tasks=humaneval", "--pass_at=ten"], "numbers parted by commas"),
        (["--tasks=humaneval", "--pass_at=1.9"], "--pass_at should be whole numbers"),
        (["--tasks=humaneval", "--pass_at=inf"], "--pass_at should be whole numbers"),
        (["--tasks=humaneval", "--pass_at="], "--pass_at should be whole numbers"),
        (["--tasks=humaneval", "--temperature=-1"], "temperature must be a finite number"),
        (["--tasks=humaneval", "--temperature=nan"], "temperature must be a finite number"),
        (["--tasks=humaneval", "--code_seconds=1e6"], "a day at most"),
        (["--tasks=humaneval", "--code_memory_mib=100000000"], "must be at most 16777216"),
        (["--tasks=cola", "--limit=inf"], "limit must be a number of rows"),
        (["--tasks=cola,gsm8k", "--max_new_tokens=512"], "gsm8k: up to 512 new tokens"),
        (["--tasks=cola,humaneval", "--allow_code_execution"], "humaneval: up to 1024 new tokens"),
        (["--tasks=mt_bench"], "give --judge"),
        (["--tasks=mt_bench", "--judge=http://x/v1", "--judge_options=1"], "a JSON object"),
        (["--tasks=cola", "--limit=1.5"], "limit must be a number of rows"),
        (["--tasks=cola", "--batch_size=0"], "batch_size"),
        (["--tasks=cola", "--dtype=float16"], "float32"),
        (["--tasks=cola", "--prompts=mine"], "prompts is 'mine'"),
        (["--tasks=cola", "--chat"], "no chat template"),
        (["--tasks=cola", "--chat_template=/none"], "there is no file /none"),
        (["--tasks=cola", "--system=hello"], "give --chat as well"),
        (["--tasks=cola", "--data=/none"], "there is no folder /none"),
        (["--tasks=cola", "--model=/none/at/all"], "there is no folder /none/at/all"),
        (["--tasks=cola", "--workdir=/none"], "there is no folder /none"),
        (["--tasks=cola", "--fsdp=3"], "does not fit"),
        (["--tasks=cola", "--max_length=1024"], "from 2 to 512"),
        (["--tasks=flores_eng_Latn-eng_Latn"], "name two languages"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, tmp_path, capsys, changes, message):
    assert main([*arguments, *changes]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_a_task_has_no_use_for_is_said(arguments, capsys, monkeypatch):
    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda *_, **__: pytest.fail("no more"))
    asked = ["--tasks=humaneval", "--allow_code_execution", "--prompts=trained", "--num_fewshot=3"]
    # Refused in the end, for want of room.
    assert main([*arguments, *asked]) == 2
    said = capsys.readouterr().err
    assert "humaneval: --num_fewshot is left aside" in said
    assert "humaneval: --prompts=trained is left aside" in said
    assert main([*arguments, "--tasks=cola", "--prompts=trained", "--num_fewshot=3", "--fsdp=3"])
    assert "left aside" not in capsys.readouterr().err


def test_a_slip_does_not_wait_for_the_whole_harness(arguments, capsys, monkeypatch):
    made = []

    class Manager(run.TaskManager):
        def __init__(self, **settings):
            made.append(settings.get("include_defaults", True))
            super().__init__(**{"include_defaults": False, **settings})

    monkeypatch.setattr(run, "TaskManager", Manager)
    for slip, said in (
        ("gsm8", "did you mean 'gsm8k'"),
        ("hellaswg", "did you mean 'hellaswag'"),
        ("nothing", "there is no task 'nothing'"),
    ):
        assert main([*arguments, f"--tasks=cola,{slip}"]) == 2
        assert said in capsys.readouterr().err
    assert made == []
    # Names of the harness that are near ones of ours are looked for there.
    for name in ("copa", "gsm8k_cot", "xnli_eu"):
        main([*arguments, f"--tasks={name}"])
    assert made == [True, True, True]


def test_a_harness_task_does_not_read_local_data(arguments, capsys, monkeypatch):
    def fail(self, names):
        raise OSError("no network")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    assert main([*arguments, "--tasks=hellaswag"]) == 2
    assert "no network; its data come from the hub: only this" in capsys.readouterr().err


def test_a_folder_in_use_is_given_up_for_another(arguments, tmp_path, capsys):
    with locked(tmp_path / "out" / ".lock"):
        assert main([*arguments, "--tasks=cola"]) == 2
    assert "a folder of its own with --output" in capsys.readouterr().err


def test_an_encoder_is_measured_elsewhere(tmp_path, capsys, shared_data):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    asked = [f"--model={tmp_path}", f"--data={shared_data}", f"--output={tmp_path / 'out'}"]
    assert main([*asked, "--tasks=cola"]) == 2
    assert "train.py measures one" in capsys.readouterr().err


def test_nothing_to_evaluate_is_refused(capsys, tmp_path):
    assert main(["--tasks=cola"]) == 2
    assert "give what is to be evaluated" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert main(["--tasks=cola", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "has no adapter/, nor a model/" in capsys.readouterr().err


def test_the_list(capsys):
    assert main(["--tasks=list"]) == 0
    assert "xnli_zh" in capsys.readouterr().out


def test_a_harness_task_that_runs_code_in_this_process_is_refused(arguments, capsys, monkeypatch):
    class Unsafe:
        UNSAFE_CODE = True

    monkeypatch.setattr(run, "build_task", lambda *_: {"tasks": {"cola": Unsafe()}})
    assert main([*arguments, "--tasks=cola"]) == 2
    assert "without a sandbox" in capsys.readouterr().err


@pytest.mark.slow
def test_no_name_of_the_harness_is_taken_for_a_slip():
    names = names_in(Path(lm_eval.tasks.__file__).parent)
    assert names.issuperset(lm_eval.tasks.TaskManager().all_tasks)
