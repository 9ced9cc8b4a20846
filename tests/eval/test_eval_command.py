"""Tests the command end to end on real data, and its rejections."""

import dataclasses
import json
from pathlib import Path

import lm_eval.tasks
import pytest

from eval import run
from eval.command import _parser, main
from eval.humaneval.task import HumanEvalSettings
from eval.model import HarnessModel
from eval.mt_bench.task import MTBenchSettings
from eval.sandbox import SandboxLimits
from eval.settings import EvalSettings
from eval.tasks.names import names_in
from peft_jax.parallel import MeshSettings
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
    assert "mrpc, qqp" in shown.err
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
    # A repetition computes nothing. With more rows, earlier responses are reused.
    monkeypatch.setattr(HarnessModel, "_score", lambda *_: pytest.fail("it was scored before"))
    assert main(asked) == 0
    assert capsys.readouterr().out == shown.out
    monkeypatch.undo()
    before = len((tmp_path / "out" / "responses.jsonl").read_text().splitlines())
    assert main([*arguments, "--tasks=cola", "--limit=4", "--devices=1"]) == 0
    assert len((tmp_path / "out" / "responses.jsonl").read_text().splitlines()) == before + 2
    assert "4 of 1,043" in capsys.readouterr().out
    # Another model must not write to the same folder.
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert main([f"--model={other}", *arguments[1:], "--tasks=cola", "--limit=4"]) == 2
    assert "of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tasks="], "no task is given"),
        (["--tasks=gsm8"], "did you mean 'gsm8k'"),
        (["--tasks=mrpc"], "no folder mrpc"),
        (["--tasks=humaneval"], "--allow_code_execution"),
        (["--tasks=humaneval", "--pass_at=ten"], "--pass_at is 'ten'"),
        (["--tasks=humaneval", "--pass_at=1.9"], "--pass_at is '1.9'"),
        (["--tasks=humaneval", "--pass_at=inf"], "--pass_at is 'inf'"),
        (["--tasks=humaneval", "--pass_at="], "--pass_at is ''"),
        (["--tasks=humaneval", "--temperature=-1"], "temperature must be a finite number"),
        (["--tasks=humaneval", "--temperature=nan"], "temperature must be a finite number"),
        (["--tasks=humaneval", "--code_seconds=1e6"], "at most 86400"),
        (["--tasks=humaneval", "--code_memory_mib=100000000"], "at most 16777216"),
        (["--tasks=cola", "--limit=inf"], "limit is inf"),
        (["--tasks=cola,gsm8k", "--max_new_tokens=512"], "gsm8k: max_new_tokens is 512"),
        (["--tasks=cola,humaneval", "--allow_code_execution"], "humaneval: max_new_tokens is 1024"),
        (["--tasks=mt_bench"], "give --judge"),
        (["--tasks=mt_bench", "--judge=http://x/v1", "--judge_options=1"], "a JSON object"),
        (["--tasks=cola", "--limit=1.5"], "limit is 1.5"),
        (["--tasks=cola", "--batch_size=0"], "batch_size"),
        (["--tasks=cola", "--chat"], "no chat template"),
        (["--tasks=cola", "--chat_template=/none"], "--chat_template is /none"),
        (["--tasks=cola", "--system=hello"], "add --chat"),
        (["--tasks=cola", "--data=/none"], "--data is /none"),
        (["--tasks=cola", "--model=/none/at/all"], "there is no folder /none/at/all"),
        (["--tasks=cola", "--workdir=/none"], "--workdir is /none"),
        (["--tasks=cola", "--fsdp=3"], "does not fit"),
        (["--tasks=cola", "--max_length=1024"], "from 2 to 512"),
        (["--tasks=flores_eng_Latn-eng_Latn"], "flores_eng_Latn-eng_Latn"),
    ],
)
def test_invalid_arguments_are_rejected_before_evaluation(
    arguments, tmp_path, capsys, changes, message
):
    assert main([*arguments, *changes]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not (tmp_path / "out" / "results.json").exists()


def test_ignored_settings_give_warnings(arguments, capsys, monkeypatch):
    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda *_, **__: pytest.fail("no more"))
    asked = ["--tasks=humaneval", "--allow_code_execution", "--prompts=trained", "--num_fewshot=3"]
    # The command is rejected after the warnings, because completions do not fit.
    assert main([*arguments, *asked]) == 2
    said = capsys.readouterr().err
    assert "humaneval ignores --num_fewshot" in said
    assert "humaneval ignores --prompts=trained" in said
    assert main([*arguments, "--tasks=cola", "--prompts=trained", "--num_fewshot=3", "--fsdp=3"])
    assert "ignores" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_misspelled_task_is_rejected_before_the_harness_loads(arguments, capsys, monkeypatch):
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
    # Names that resemble this project's tasks may be the harness's own.
    for name in ("copa", "gsm8k_cot", "xnli_eu"):
        main([*arguments, f"--tasks={name}"])
    assert made == [True, True, True]


@pytest.mark.slow
def test_a_harness_task_does_not_read_local_data(arguments, capsys, monkeypatch):
    def fail(self, names):
        raise OSError("no network")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    assert main([*arguments, "--tasks=hellaswag"]) == 2
    assert "only this project's tasks read --data" in capsys.readouterr().err


def test_an_output_folder_in_use_is_rejected(arguments, tmp_path, capsys):
    with locked(tmp_path / "out" / ".lock"):
        assert main([*arguments, "--tasks=cola"]) == 2
    assert "a folder of its own with --output" in capsys.readouterr().err


def test_an_encoder_is_rejected(tmp_path, capsys, shared_data):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    asked = [f"--model={tmp_path}", f"--data={shared_data}", f"--output={tmp_path / 'out'}"]
    assert main([*asked, "--tasks=cola"]) == 2
    assert "is an encoder" in capsys.readouterr().err


def test_a_missing_or_unfinished_model_is_rejected(capsys, tmp_path):
    assert main(["--tasks=cola"]) == 2
    assert "no model is given" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert main(["--tasks=cola", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "has neither adapter/ nor model/" in capsys.readouterr().err


def test_tasks_are_listed(capsys):
    assert main(["--tasks=list"]) == 0
    assert "xnli_zh" in capsys.readouterr().out


def test_a_harness_task_that_runs_code_in_this_process_is_rejected(arguments, capsys, monkeypatch):
    class Unsafe:
        UNSAFE_CODE = True

    monkeypatch.setattr(run, "build_task", lambda *_: {"tasks": {"cola": Unsafe()}})
    assert main([*arguments, "--tasks=cola"]) == 2
    assert "without a sandbox" in capsys.readouterr().err


@pytest.mark.slow
def test_every_name_of_the_harness_is_known():
    names = names_in(Path(lm_eval.tasks.__file__).parent)
    assert names.issuperset(lm_eval.tasks.TaskManager().all_tasks)


@pytest.mark.parametrize("flag", ["--dtype=float16", "--prompts=mine"])
def test_a_value_that_is_no_choice_is_rejected_with_the_choices(flag, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--tasks=cola", flag])
    assert left.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_flags_have_the_defaults_of_the_settings():
    """The parser states the defaults itself, so that it reports a typo before JAX starts."""
    given = vars(_parser().parse_args([]))
    code, limits, judging = HumanEvalSettings(), SandboxLimits(), MTBenchSettings()
    settings = {field.name: field.default for field in dataclasses.fields(EvalSettings)}
    # Not given is None here, for what must be the run's own.
    shared = settings.keys() & given.keys() - {"tasks", "workdir"}
    assert {name: given[name] for name in shared} == {name: settings[name] for name in shared}
    own = {
        "samples_per_problem": code.samples,
        "temperature": code.temperature,
        "code_workers": code.workers,
        "code_seconds": limits.seconds,
        "code_memory_mib": limits.memory_mib,
        "judge": judging.judge,
        "judge_model": judging.model,
        "judge_budget": judging.budget,
        "judge_retries": judging.retries,
        "judge_workers": judging.workers,
        **{name: getattr(MeshSettings(), name) for name in ("fsdp", "tensor", "devices")},
    }
    assert {name: given[name] for name in own} == own
