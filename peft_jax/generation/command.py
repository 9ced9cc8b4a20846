r"""Continues prompts with a model, with or without an adapter.

    peft-jax generate --adapter=runs/gsm8k/adapter \
        --prompt=$'Question: How many are 3 and 4 apples?\nAnswer:'

The base model is the one that the adapter was trained on, unless --model names another. Its
quantization is that of training, unless --quantization sets another. --prompt may be given several
times; without it, every line of standard input is a prompt. With --chat a prompt is a user's
message, in the tokenizer's chat template or that of --chat_template. Prompts should have the format
of the training data: `docs/data.md` says how rows become prompts. Answers go to standard output,
messages to standard error.

Exit codes: 0 done; 1 failed; 2 invalid request; 130 stopped by Ctrl-C. See docs/exit_codes.md.
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
    """Runs the command and returns its exit code; `argv` excludes the program's name."""
    given = _parser().parse_args(argv)
    prompts = given.prompt or _lines()
    if not prompts:
        raise ValueError("there is no prompt: give --prompt, or lines on standard input")
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
    """Loads the model and continues the prompts."""
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
            f"loaded the base model in {loaded.quantization}, as in the adapter's training;"
            " --quantization=none loads it unquantized",
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
    """Returns the prompts on standard input, unless it is a terminal."""
    if sys.stdin.isatty():
        return []
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _as_text(prompt: str, completion: TextCompletion, prompts: Sequence[str]) -> str:
    """Returns a completion as text, after its prompt if there are several."""
    return completion.text if len(prompts) == 1 else f"--- {prompt}\n{completion.text}\n"


def _as_json(prompt: str, completion: TextCompletion) -> str:
    """Returns a completion as a line of JSON."""
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
    add("--adapter", help="an adapter's folder, such as a run's adapter/, or gs:// or s3://")
    add("--merge", action="store_true", help="merge the adapter into the parameters first")
    add("--dtype", default="float32", help="dtype of parameters and computation: float32, bfloat16")
    add(
        "--quantization",
        choices=FORMATS,
        help="quantization of the base model's kernels; by default that of the adapter's training",
    )
    add("--prompt", action="append", help="a prompt; may be given several times")
    add("--chat", action="store_true", help="format prompts with the tokenizer's chat template")
    add("--chat_template", help="a file with a Jinja template; by default the tokenizer's own")
    add("--system", default="", help="with --chat, the system message")
    add(
        "--split_special_tokens",
        action="store_true",
        help="tokenize control tokens in prompts as plain text",
    )
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="maximum new tokens")
    add("--temperature", type=float, default=default.temperature, help="0 decodes greedily")
    add("--top_k", type=int, default=default.top_k, help="sample from the k likeliest tokens")
    add("--top_p", type=float, default=default.top_p, help="sample from this probability mass")
    add("--seed", type=int, default=default.seed, help="seed of sampling")
    add("--stop", action="append", default=[], help="a stop string; may be given several times")
    add("--batch_size", type=int, default=default.batch_size, help="prompts per batch")
    add("--json", action="store_true", help="print a line of JSON for each prompt")
    return parser
