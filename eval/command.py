r"""Evaluates a run, or a checkpoint, on benchmarks.

    peft-jax eval --workdir=runs/gsm8k --tasks=gsm8k,glue
    peft-jax eval --model=/path/to/checkpoint --tasks=xnli --data=folder

--workdir is a run's folder; its adapter is evaluated on the base it was made for. --model alone is
a plain checkpoint, --adapter an adapter's folder. --tasks=list says what there is. Data come from
the Hugging Face hub, or with --data from a folder of local files.

Results go to --output, as results.json and results.md; by default to eval/ in the run's folder. The
same command again goes on where it was stopped, and does no task twice.

Exit codes: 0 done; 1 failed, as when the judge of mt_bench does; 2 refused; 130 stopped by Ctrl-C.
docs/exit_codes.md says more.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments


@exits.command("eval", stopped="stopped; the same command goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    given = _parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-evaluation-harness is not installed: pip install "peft_jax[eval]"')
    # The harness draws a bar for every small step; those that matter are drawn here.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    from peft_jax.parallel import MeshSettings
    from peft_jax.runtime.progress import Reporter

    from .humaneval import task as humaneval
    from .humaneval.task import HumanEvalSettings
    from .mt_bench import task as mt_bench
    from .mt_bench.task import MTBenchSettings
    from .run import run
    from .sandbox import SandboxLimits
    from .settings import EvalSettings
    from .tasks.names import HUMANEVAL, MT_BENCH, listing

    names = tuple(name.strip() for name in given.tasks.split(",") if name.strip())
    if names == ("list",):
        print(listing())
        return 0
    settings = EvalSettings(
        tasks=names,
        workdir=given.workdir,
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
    print(f"results are in {settings.output_folder}", file=sys.stderr)
    return 0


def _numbers(flag: str, text: str) -> tuple[float, ...] | None:
    """Numbers parted by commas; None where there is nothing.

    Raises:
      ValueError: something else.
    """
    if not text:
        return None
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{flag} should be numbers parted by commas, but is {text!r}") from error


def _whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers parted by commas.

    Raises:
      ValueError: something else.
    """
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{flag} should be whole numbers parted by commas, but is {text!r}"
        ) from error


def _json_object(flag: str, text: str) -> dict[str, Any]:
    """An object in JSON.

    Raises:
      ValueError: something else.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag} should be a JSON object, but is {text!r}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _parser() -> argparse.ArgumentParser:
    parser = Arguments("eval", description=__doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--workdir", type=Path, help="a finished run's folder")
    add("--model", help="a checkpoint's folder or name on the hub; else the adapter's base")
    add("--adapter", help="an adapter's folder or name on the hub")
    add("--merge", action="store_true", help="merge the adapter into the parameters first")
    add("--dtype", default="float32", help="of parameters and computation: float32, bfloat16")
    add(
        "--quantization",
        choices=("none", "int8", "nf4"),
        help="how the base's kernels are held; by default as the adapter was trained",
    )
    add = parser.add_argument_group("on what").add_argument
    add("--tasks", default="", help="names, parted by commas; `list` shows what there is")
    add("--data", type=Path, help="a folder of local files; else the Hugging Face hub")
    add("--limit", type=float, help="so many rows of each task, or a share of them below 1")
    add(
        "--prompts",
        default="harness",
        help="harness: comparable with published numbers; trained: those that training uses",
    )
    add("--num_fewshot", type=int, help="examples put before each question; else as the task says")
    add("--max_new_tokens", type=int, help="the most new tokens; else as the task says")
    add("--chat", action="store_true", help="put the tokenizer's chat template around prompts")
    add("--chat_template", type=Path, help="a file with a Jinja template; else the tokenizer's own")
    add("--system", default="", help="in a chat, what the system says first")
    add(
        "--split_special_tokens",
        action=argparse.BooleanOptionalAction,
        help="tokenize control tokens in prompts as characters; by default as the run did",
    )
    add = parser.add_argument_group("how").add_argument
    add("--output", type=Path, help="where results go")
    add("--batch_size", type=int, default=16, help="rows of a batch")
    add("--max_length", type=int, help="the longest text in tokens; else what the model allows")
    add("--seed", type=int, default=0, help="of sampling")
    add("--fsdp", type=int, default=1, help="devices that parameters are cut over")
    add("--tensor", type=int, default=1, help="devices that single layers are cut over")
    add("--devices", type=int, default=0, help="use only so many devices; 0 for all")
    add = parser.add_argument_group("generated code (humaneval)").add_argument
    add("--allow_code_execution", action="store_true", help="run it, in a sandbox")
    add(
        "--allow_unisolated_code",
        action="store_true",
        help="run it without the sandbox's isolation, with the rights of your user",
    )
    add("--samples_per_problem", type=int, default=1, help="completions of each problem")
    add("--pass_at", default="1", help="the k of pass@k, parted by commas")
    add("--temperature", type=float, help="of completions; else 0 for one sample, 0.8 for several")
    add("--code_seconds", type=float, default=10.0, help="how long a program may run")
    add("--code_memory_mib", type=int, default=1024, help="how much memory it may take")
    add("--code_workers", type=int, default=0, help="programs at a time; 0: up to four")
    add = parser.add_argument_group("the judge (mt_bench)").add_argument
    add("--judge", default="", help="https://…/v1, an endpoint of OpenAI's protocol; local:FOLDER")
    add("--judge_model", default="", help="the model that the endpoint is asked for")
    add("--judge_key_variable", default="OPENAI_API_KEY", help="the environment's name of its key")
    add("--judge_options", default="{}", help="fields of each request in JSON; null takes one away")
    add("--judge_prices", default="", help="of a million tokens of prompts, and of answers: 2.5,10")
    add("--judge_budget", type=float, help="what it may cost at most, by those prices")
    add("--judge_retries", type=int, default=5, help="how often a failed request is made again")
    add("--judge_workers", type=int, default=4, help="requests at a time")
    return parser
