r"""Evaluates a run, or a checkpoint, on benchmarks; from the repository's root.

    python -m eval --workdir=runs/gsm8k --tasks=gsm8k,glue
    python -m eval --model=/path/to/checkpoint --tasks=xnli,flores --data=folder --limit=100

--workdir is a run's folder; its adapter is evaluated on the base it was made for. --model alone is
a plain checkpoint, --adapter an adapter's folder. --tasks=list says what there is. Data come from
the Hugging Face hub, or with --data from a folder of local files.

Results go to --output, as results.json and results.md; by default to eval/ in the run's folder. The
same command again goes on where it was stopped, and does no task twice.

Exit codes: 0 done; 2 refused; 130 stopped by Ctrl-C.
"""

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_REFUSED, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    given = _parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        return _refuse('lm-evaluation-harness is not installed: pip install -e ".[eval]"')
    # The harness draws a bar for every small step; those that matter are drawn here.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    from eval.humaneval.task import HumanEvalSettings, make_job
    from eval.run import run
    from eval.sandbox import SandboxLimits
    from eval.settings import EvalSettings
    from eval.tasks.names import HUMANEVAL, listing
    from peft_jax.parallel import MeshSettings
    from peft_jax.training.errors import RefusedError

    names = tuple(name.strip() for name in given.tasks.split(",") if name.strip())
    if names == ("list",):
        print(listing())
        return 0
    try:
        settings = EvalSettings(
            tasks=names,
            workdir=given.workdir,
            model=given.model,
            adapter=given.adapter,
            merge=given.merge,
            dtype=given.dtype,
            output=given.output,
            data=given.data,
            limit=given.limit,
            prompts=given.prompts,
            num_fewshot=given.num_fewshot,
            max_new_tokens=given.max_new_tokens,
            chat=given.chat,
            system=given.system,
            batch_size=given.batch_size,
            max_length=given.max_length,
            seed=given.seed,
            mesh=MeshSettings(fsdp=given.fsdp, tensor=given.tensor, devices=given.devices),
        )
        code = HumanEvalSettings(
            allowed=given.allow_code_execution or given.allow_unisolated_code,
            unisolated=given.allow_unisolated_code,
            samples=given.samples_per_problem,
            pass_at=tuple(int(k) for k in given.pass_at.split(",")),
            temperature=given.temperature,
            limits=SandboxLimits(seconds=given.code_seconds, memory_mib=given.code_memory_mib),
            workers=given.code_workers,
        )
        makers = {HUMANEVAL: functools.partial(make_job, settings=settings, code=code)}
        print(run(settings, makers=makers, allow_unsafe=given.allow_unisolated_code), end="")
    except (RefusedError, ValueError, FloatingPointError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    print(f"results are in {settings.output_folder}", file=sys.stderr)
    return 0


def _refuse(message: str) -> int:
    print(f"eval: {message}", file=sys.stderr)
    return _REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--workdir", type=Path, help="a finished run's folder")
    add("--model", help="a checkpoint's folder or name on the hub; else the adapter's base")
    add("--adapter", help="an adapter's folder or name on the hub")
    add("--merge", action="store_true", help="merge the adapter into the parameters first")
    add("--dtype", default="float32", help="of parameters and computation: float32, bfloat16")
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
    add("--system", default="", help="with --chat, what the system says first")
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
    return parser
