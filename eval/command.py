r"""Evaluates a run, an adapter or a checkpoint on benchmarks.

    peft-jax eval --workdir=runs/gsm8k --tasks=gsm8k,glue
    peft-jax eval --model=/path/to/checkpoint --tasks=xnli --data=folder

--workdir names the folder of a finished run, also one in a bucket (gs://,
s3://); its adapter is evaluated on its base model. --model alone evaluates a
checkpoint. --adapter evaluates an adapter's folder. --tasks=list lists the
tasks. Data come from the Hugging Face hub, or with --data from a folder of
local files.

Results are written to --output, as results.json and results.md; by default to
eval/ in the run's folder. The same command again resumes an interrupted
evaluation, and repeats no finished task.

Exit codes: 0 done; 1 failed, for example because the judge of mt_bench did; 2
rejected; 130 stopped by Ctrl-C. docs/exit_codes.md has those of all commands.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

if TYPE_CHECKING:
    from .bucket_runs import Run


@exits.command("eval", stopped="stopped; the same command resumes from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = _parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-evaluation-harness is not installed: pip install "peft_jax[eval]"')
    # The harness shows a progress bar for every small step; this command shows its own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from .bucket_runs import open_run
    from .tasks.names import listing

    names = tuple(name.strip() for name in given.tasks.split(",") if name.strip())
    if names == ("list",):
        print(listing())
        return 0
    with open_run(given.workdir) as of_run:
        _evaluate(given, names, of_run)
    return 0


def _evaluate(given: argparse.Namespace, names: tuple[str, ...], of_run: "Run") -> None:
    """Runs the tasks, and prints the results."""
    from peft_jax.parallel import MeshSettings
    from peft_jax.runtime.progress import Reporter

    from .humaneval import task as humaneval
    from .humaneval.task import HumanEvalSettings
    from .mt_bench import task as mt_bench
    from .mt_bench.task import MTBenchSettings
    from .run import run
    from .sandbox import SandboxLimits
    from .settings import EvalSettings
    from .tasks.names import HUMANEVAL, MT_BENCH

    settings = EvalSettings(
        tasks=names,
        workdir=of_run.folder,
        url=of_run.url,
        model=given.model,
        adapter=given.adapter,
        merge=given.merge,
        dtype=given.dtype,
        quantization=given.quantization,
        output=given.output,
        data=given.data,
        limit=given.limit,
        prompts=given.prompts,
        num_fewshot=given.num_fewshot,
        max_new_tokens=given.max_new_tokens,
        chat=given.chat,
        chat_template=given.chat_template,
        system=given.system,
        split_special_tokens=given.split_special_tokens,
        batch_size=given.batch_size,
        max_length=given.max_length,
        seed=given.seed,
        mesh=MeshSettings(fsdp=given.fsdp, tensor=given.tensor, devices=given.devices),
    )
    code = HumanEvalSettings(
        allowed=given.allow_code_execution or given.allow_unisolated_code,
        unisolated=given.allow_unisolated_code,
        samples=given.samples_per_problem,
        pass_at=_whole_numbers("--pass_at", given.pass_at),
        temperature=given.temperature,
        limits=SandboxLimits(seconds=given.code_seconds, memory_mib=given.code_memory_mib),
        workers=given.code_workers,
    )
    judging = MTBenchSettings(
        judge=given.judge,
        model=given.judge_model,
        key=os.environ.get(given.judge_key_variable, ""),
        options=_json_object("--judge_options", given.judge_options),
        prices=_numbers("--judge_prices", given.judge_prices),  # type: ignore[arg-type]
        budget=given.judge_budget,
        retries=given.judge_retries,
        workers=given.judge_workers,
    )
    reporter = Reporter()
    makers = {
        HUMANEVAL: functools.partial(humaneval.make_job, settings=settings, code=code),
        MT_BENCH: functools.partial(
            mt_bench.make_job, settings=settings, judging=judging, reporter=reporter
        ),
    }
    allow_unsafe = given.allow_unisolated_code
    print(run(settings, makers=makers, reporter=reporter, allow_unsafe=allow_unsafe), end="")
    print(f"results: {of_run.shown(settings.output_folder)}", file=sys.stderr)


def _numbers(flag: str, text: str) -> tuple[float, ...] | None:
    """Parses numbers separated by commas; returns None for an empty text.

    Raises:
      ValueError: `text` is something else.
    """
    if not text:
        return None
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{flag} is {text!r} but must be numbers separated by commas, for example 2.5,10"
        ) from error


def _whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parses whole numbers separated by commas.

    Raises:
      ValueError: `text` is something else.
    """
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{flag} is {text!r} but must be whole numbers separated by commas, for example 1,10"
        ) from error


def _json_object(flag: str, text: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      ValueError: `text` is something else.
    """
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} is {text!r}, which is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f'{flag} is {text!r} but must be a JSON object, for example {{"seed": 1}}')
    return value


def _reject_constant(name: str) -> None:
    raise ValueError(f"JSON has no number {name}")


def _parser() -> argparse.ArgumentParser:
    parser = Arguments("eval", description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--workdir", help="folder of a finished run, also gs:// or s3://")
    add(
        "--model",
        help="folder of a checkpoint, or its name on the hub; by default the adapter's base model",
    )
    add("--adapter", help="folder of an adapter, or its name on the hub")
    add("--merge", action="store_true", help="merge the adapter into the parameters first")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="parameter and compute dtype",
    )
    add(
        "--quantization",
        choices=("none", "int8", "nf4", "w8a8", "w8a8g8"),
        help="quantization of the base model; by default as in training",
    )
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", default="", help="task names, separated by commas; `list` lists them")
    add("--data", type=Path, help="folder of local data; by default the Hugging Face hub")
    add("--limit", type=float, help="number of rows per task, or a fraction of them below 1")
    add(
        "--prompts",
        choices=("harness", "trained"),
        default="harness",
        help="harness: comparable with published numbers; trained: the prompts of training",
    )
    add("--num_fewshot", type=int, help="examples before each question; by default the task's")
    add("--max_new_tokens", type=int, help="maximum new tokens; by default the task's")
    add("--chat", action="store_true", help="apply the tokenizer's chat template to prompts")
    add(
        "--chat_template",
        type=Path,
        help="file with a Jinja chat template; by default the tokenizer's own",
    )
    add("--system", default="", help="system message of a chat")
    add(
        "--split_special_tokens",
        action=argparse.BooleanOptionalAction,
        help="tokenize control tokens in prompts as characters; by default as in training",
    )
    add = parser.add_argument_group("execution").add_argument
    add(
        "--output",
        type=Path,
        help="folder of the results; by default eval/ in the run's folder, and runs/eval-NAME"
        " without a run",
    )
    add("--batch_size", type=int, default=16, help="rows per batch")
    add("--max_length", type=int, help="maximum tokens of a text; by default the model's maximum")
    add("--seed", type=int, default=0, help="sampling seed")
    add("--fsdp", type=int, default=1, help="devices that parameters are sharded over")
    add("--tensor", type=int, default=1, help="devices that each layer is sharded over")
    add("--devices", type=int, default=0, help="number of devices to use; 0: all")
    add = parser.add_argument_group("generated code (humaneval)").add_argument
    add("--allow_code_execution", action="store_true", help="run generated code in a sandbox")
    add(
        "--allow_unisolated_code",
        action="store_true",
        help="run generated code without isolation, with your user's permissions",
    )
    add("--samples_per_problem", type=int, default=1, help="completions per problem")
    add("--pass_at", default="1", help="values of k in pass@k, separated by commas")
    add(
        "--temperature",
        type=float,
        help="sampling temperature; by default 0 for one sample and 0.8 for several",
    )
    add("--code_seconds", type=float, default=10.0, help="time limit of a program")
    add("--code_memory_mib", type=int, default=1024, help="memory limit of a program")
    add("--code_workers", type=int, default=0, help="programs run at once; 0: up to four")
    add = parser.add_argument_group("judge (mt_bench)").add_argument
    add(
        "--judge",
        default="",
        help="OpenAI-compatible endpoint, https://…/v1, or local:FOLDER for a local model",
    )
    add("--judge_model", default="", help="model name that is sent to the endpoint")
    add(
        "--judge_key_variable",
        default="OPENAI_API_KEY",
        help="environment variable that holds the endpoint's key",
    )
    add("--judge_options", default="{}", help="request fields as JSON; null removes a field")
    add(
        "--judge_prices",
        default="",
        help="prices per million prompt tokens and per million completion tokens: 2.5,10",
    )
    add("--judge_budget", type=float, help="maximum cost of the judge, by those prices")
    add("--judge_retries", type=int, default=5, help="retries of a failed request")
    add("--judge_workers", type=int, default=4, help="concurrent requests")
    return parser
