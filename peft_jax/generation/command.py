r"""Continues prompts with a model, or with what a run made of it.

    peft-jax generate --adapter=runs/gsm8k/adapter \
        --prompt=$'Question: How many are 3 and 4 apples?\nAnswer:'

The base is the one the run started from, unless --model names another; without --adapter it is
--model alone. A base that an adapter was trained on in fewer bits is held in these again, unless
--quantization says otherwise. --prompt may be given several times; without it, every line of the
standard input is a prompt. With --chat a prompt is what the user says, and the tokenizer's chat
template, or that of --chat_template, is put around it. What is asked should look like what was
trained on: `docs/data.md` says how rows become prompts. Answers go to the standard output, what
else there is to say to the standard error.

Exit codes: 0 done; 1 failed; 2 refused; 130 stopped by Ctrl-C. docs/exit_codes.md says more.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from peft_jax.core import FORMATS
from peft_jax.generation.from_text import Prompt, TextCompletion, generate_text
from peft_jax.generation.loading import load_for_generation
from peft_jax.generation.settings import GenerationSettings
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments


@exits.command("peft_jax.generation")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    given = _parser().parse_args(argv)
    prompts = given.prompt or _lines()
    if not prompts:
        raise ValueError("there is no prompt: give --prompt, or lines on the standard input")
    settings = GenerationSettings(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
        stop_strings=given.stop,
        batch_size=given.batch_size,
    )
    completions = _answer(given, prompts, settings)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(_as_json(prompt, completion) if given.json else _as_text(prompt, completion, prompts))
    return 0


def _answer(
    given: argparse.Namespace, prompts: Sequence[str], settings: GenerationSettings
) -> tuple[TextCompletion, ...]:
    """Loads what was asked for and continues the prompts."""
    loaded = load_for_generation(
        given.model,
        given.adapter,
        merge=given.merge,
        dtype=given.dtype,
        quantization=given.quantization,
        chat_template=given.chat_template,
    )
    if given.quantization is None and loaded.quantization != "none":
        print(
            f"the base's kernels are held in {loaded.quantization}, as the adapter was trained;"
            " --quantization=none for as they are",
            file=sys.stderr,
        )
    asked: list[Prompt] = list(prompts)
    if given.chat:
        begin = [{"role": "system", "content": given.system}] if given.system else []
        asked = [[*begin, {"role": "user", "content": prompt}] for prompt in prompts]
    settings = dataclasses.replace(settings, eos_ids=loaded.eos_ids)
    found = generate_text(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        asked,
        settings,
        split_special_tokens=given.split_special_tokens,
    )
    print(found.stats, file=sys.stderr)
    return found.completions


def _lines() -> list[str]:
    """The prompts on the standard input, unless it is a person."""
    if sys.stdin.isatty():
        return []
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _as_text(prompt: str, completion: TextCompletion, prompts: Sequence[str]) -> str:
    """A completion to be read; behind its prompt where there are several."""
    return completion.text if len(prompts) == 1 else f"--- {prompt}\n{completion.text}\n"


def _as_json(prompt: str, completion: TextCompletion) -> str:
    """A completion as a line of JSON."""
    return json.dumps(
        {
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "new_tokens": len(completion.tokens),
        },
        ensure_ascii=False,
    )


def _parser() -> argparse.ArgumentParser:
    default = GenerationSettings()
    parser = Arguments("peft_jax.generation", description=__doc__)
    add = parser.add_argument
    add("--model", help="the checkpoint's folder, or its name on the Hugging Face hub")
    add("--adapter", help="an adapter's folder, such as a run's adapter/")
    add("--merge", action="store_true", help="merge the adapter into the parameters first")
    add("--dtype", default="float32", help="of parameters and computation: float32, bfloat16")
    add(
        "--quantization",
        choices=FORMATS,
        help="the base's kernels as they are (none) or in fewer bits; by default as the adapter was"
        " trained",
    )
    add("--prompt", action="append", help="a prompt; may be given several times")
    add("--chat", action="store_true", help="put the tokenizer's chat template around prompts")
    add("--chat_template", help="a file with a Jinja template; else the tokenizer's own")
    add("--system", default="", help="with --chat, what the system says first")
    add(
        "--split_special_tokens",
        action="store_true",
        help="tokenize control tokens in prompts as the characters that they are",
    )
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="the most new tokens")
    add("--temperature", type=float, default=default.temperature, help="0 takes the likeliest")
    add("--top_k", type=int, default=default.top_k, help="sample among so many likeliest tokens")
    add("--top_p", type=float, default=default.top_p, help="sample among so much probability")
    add("--seed", type=int, default=default.seed, help="of sampling")
    add("--stop", action="append", default=[], help="a text to stop at; may be given several times")
    add("--batch_size", type=int, default=default.batch_size, help="prompts at a time")
    add("--json", action="store_true", help="a line of JSON for each prompt")
    return parser
