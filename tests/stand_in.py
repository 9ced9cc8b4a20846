"""Data of our own in the form and number of the published sets, where these are not at hand.

Sentences are the tiny world's, problems are sums, chat templates are written after the formats that
the families document. Nothing here is copied from a published set.
"""

import gzip
import json
import random
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

from examples.tiny_world import any_text
from examples.tiny_world import rows as tiny_rows

ROOT = Path(__file__).parents[1]
LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "sw", "zh")
FLORES = (
    *("arb_Arab", "deu_Latn", "eng_Latn", "fra_Latn"),
    *("hin_Deva", "spa_Latn", "swh_Latn", "zho_Hans"),
)
CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
WITH_REFERENCE = ("reasoning", "math", "coding")

_TURN = "{% for message in messages %}"
_END = "{% endfor %}"
_SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
)


def _turned(begin: str, end: str, prompt: str) -> str:
    """A template in which all roles look alike."""
    return (
        f"{_TURN}{begin}{{{{ message.content | trim }}}}{end}{_END}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def _two(user: str, assistant: str, system: str, prompt: str) -> str:
    """A template with a form for what is asked, one for what is answered, and the system's text."""
    return (
        f"{_SYSTEM_FIRST}{system}{_TURN}{{% if message.role == 'user' %}}{user}"
        f"{{% else %}}{assistant}{{% endif %}}{_END}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


_TEXT, _EOS, _NEWLINE = "{{ message.content | trim }}", "{{ eos_token }}", "{{ '\\n' }}"
_ROLE = "{{ message.role }}"

TEMPLATES = {
    "chatml": _turned(
        f"<|im_start|>{_ROLE}{_NEWLINE}",
        f"<|im_end|>{_NEWLINE}",
        f"<|im_start|>assistant{_NEWLINE}",
    ),
    "qwen2.5-instruct": _turned(
        f"<|im_start|>{_ROLE}{_NEWLINE}",
        f"<|im_end|>{_NEWLINE}",
        f"<|im_start|>assistant{_NEWLINE}",
    ),
    "phi-3": _turned(f"<|{_ROLE}|>{_NEWLINE}", f"<|end|>{_NEWLINE}", f"<|assistant|>{_NEWLINE}"),
    "zephyr": _turned(f"<|{_ROLE}|>{_NEWLINE}", f"{_EOS}{_NEWLINE}", f"<|assistant|>{_NEWLINE}"),
    "llama-3-instruct": (
        "{{ bos_token }}"
        + _turned(
            f"<|start_header_id|>{_ROLE}<|end_header_id|>{_NEWLINE}{_NEWLINE}",
            "<|eot_id|>",
            f"<|start_header_id|>assistant<|end_header_id|>{_NEWLINE}{_NEWLINE}",
        )
    ),
    "gemma-it": "{{ bos_token }}"
    + _two(
        f"<start_of_turn>user{_NEWLINE}{_TEXT}<end_of_turn>{_NEWLINE}",
        f"<start_of_turn>model{_NEWLINE}{_TEXT}<end_of_turn>{_NEWLINE}",
        "",
        f"<start_of_turn>model{_NEWLINE}",
    ),
    "alpaca": "{{ bos_token }}"
    + _two(
        f"### Instruction:{_NEWLINE}{_TEXT}{_NEWLINE}{_NEWLINE}",
        f"### Response:{_NEWLINE}{_TEXT}{_EOS}{_NEWLINE}{_NEWLINE}",
        f"{{% if system %}}{{{{ system }}}}{_NEWLINE}{_NEWLINE}{{% endif %}}",
        f"### Response:{_NEWLINE}",
    ),
    "vicuna": "{{ bos_token }}"
    + _two(
        f"USER: {_TEXT}{_NEWLINE}",
        f"ASSISTANT: {_TEXT}{_EOS}{_NEWLINE}",
        f"{{% if system %}}{{{{ system }}}}{_NEWLINE}{{% endif %}}",
        "ASSISTANT:",
    ),
    "llama-2-chat": _two(
        "{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>{{ '\\n' }}{{ system }}"
        "{{ '\\n' }}<</SYS>>{{ '\\n\\n' }}{% endif %}" + f"{_TEXT} [/INST]",
        f" {_TEXT} {_EOS}",
        "",
        "",
    ),
    "mistral-instruct": "{{ bos_token }}"
    + _two(
        "[INST] {% if loop.first and system %}{{ system }}{{ '\\n\\n' }}{% endif %}"
        + f"{_TEXT} [/INST]",
        f" {_TEXT}{_EOS}",
        "",
        "",
    ),
}
"""Chat templates of ten families, by the names of their files."""


def make_stand_in(folder: Path) -> Path:
    """Writes everything below a folder, and returns it."""
    sentences = _sentences()
    _glue(folder / "glue", sentences)
    for split, count in (("dev", 2490), ("test", 5010)):
        for language in LANGUAGES:
            _write(folder / "xnli" / f"{split}-{language}.tsv", _xnli(language, count))
    for split, count in (("dev", 997), ("devtest", 1012)):
        for language in FLORES:
            lines = (f"{language[:3]} {number}: a bird sang。" for number in range(count))
            _write(folder / "flores200" / split / f"{language}.{split}", lines)
    for split, count in (("train", 7473), ("test", 1319)):
        _write(folder / "gsm8k" / f"{split}.jsonl", _json_lines(_sums(count)))
    (folder / "humaneval").mkdir()
    problems = "".join(f"{line}\n" for line in _json_lines(_problems(164)))
    (folder / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(problems.encode()))
    _mt_bench(folder / "mt_bench", sentences)
    templates = folder / "tokenizers" / "chat_templates"
    for name, text in TEMPLATES.items():
        _write(templates / f"{name}.jinja", [text], end="")
    _save_llama3(folder / "tokenizers" / "llama3")
    _save_letters(folder / "tokenizers" / "letters")
    # A model that has read stories and knows no chat.
    model = folder / "models" / "tinystories656K"
    ignored = shutil.ignore_patterns("chat_template.jinja")
    shutil.copytree(ROOT / "assets" / "tiny_world", model, ignore=ignored)
    return folder


def _write(path: Path, lines: object, *, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}{end}" for line in lines), encoding="utf-8")  # type: ignore[attr-defined]


def _json_lines(rows: Iterator[dict[str, object]]) -> Iterator[str]:
    return map(json.dumps, rows)


def _sentences() -> list[str]:
    texts = tiny_rows(any_text, count=200, seed="stand-in")
    found = [line for text in texts for line in str(text).replace("\n", " ").split(". ")]
    return [line.strip(" .") for line in found if 10 < len(line) < 80 and '"' not in line]


def _glue(folder: Path, sentences: list[str]) -> None:
    drawn = random.Random(0)
    for split, counts in {"train": (8551, 67349, 2490), "dev": (1043, 872, 277)}.items():
        cola, sst2, rte = counts
        _write(
            folder / "CoLA" / f"{split}.tsv",
            (f"own\t{n % 3 and 1}\t\t{drawn.choice(sentences)}." for n in range(cola)),
        )
        rows = (f"{drawn.choice(sentences)} .\t{number % 2}" for number in range(sst2))
        _write(folder / "SST-2" / f"{split}.tsv", ["sentence\tlabel", *rows])
        names = ("entailment", "not_entailment")
        pairs = (
            f"{n}\t{drawn.choice(sentences)}.\t{drawn.choice(sentences)}.\t{names[n % 2]}"
            for n in range(rte)
        )
        _write(folder / "RTE" / f"{split}.tsv", ["index\tsentence1\tsentence2\tlabel", *pairs])


def _xnli(language: str, count: int) -> Iterator[str]:
    labels = ("neutral", "contradiction", "entailment")
    for number in range(count):
        yield f"{language}: bird {number} sang.\t{language}: it sang.\t{labels[number % 3]}"


def _sums(count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        one, other = number % 97, number % 31
        yield {
            "question": f"Ann has {one} pears and buys {other}. How many has she?",
            "answer": f"She has {one} + {other} = <<{one}+{other}={one + other}>>{one + other}"
            f" pears.\n#### {one + other}",
        }


def _problems(count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        yield {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def add_{number}(x: int) -> int:\n    """Adds {number}."""\n',
            "entry_point": f"add_{number}",
            "canonical_solution": f"    return x + {number}\n",
            "test": "def check(candidate):\n"
            f"    assert candidate(0) == {number}\n    assert candidate(7) == {number + 7}\n",
        }


def _mt_bench(folder: Path, sentences: list[str]) -> None:
    questions, references = [], []
    for place, category in enumerate(CATEGORIES):
        for number in range(10):
            identity = 81 + 10 * place + number
            turns = [f"Say more of this: {sentences[identity]}.", "Say it in fewer words."]
            questions.append({"question_id": identity, "category": category, "turns": turns})
            if category in WITH_REFERENCE:
                choices = [{"index": 0, "turns": [f"Answer {identity}.", f"Short: {identity}."]}]
                references.append({"question_id": identity, "model_id": "own", "choices": choices})
    _write(folder / "question.jsonl", _json_lines(iter(questions)))
    _write(folder / "reference_answer_gpt-4.jsonl", _json_lines(iter(references)))
    rating = "Rate the answer from 1 to 10 in the form [[rating]], as in Rating: [[5]]."
    one = "[Question]\n{question}\n\n[Answer]\n{answer}\n[End]"
    two = (
        "### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n"
        "### User:\n{question_2}\n\n### Assistant A:\n{answer_2}"
    )
    prompts = {
        "single-v1": f"{rating}\n\n{one}",
        "single-math-v1": f"{rating}\n\n[Reference]\n{{ref_answer_1}}\n\n{one}",
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": "[Reference]\n{question_1}\n{ref_answer_1}\n{question_2}\n"
        f"{{ref_answer_2}}\n\n{two}",
    }
    rows = (
        {
            "name": name,
            "type": "single",
            "system_prompt": rating if "multi" in name else "You judge answers.",
            "prompt_template": text,
            "description": "own",
            "category": "math" if "math" in name else "general",
            "output_format": "[[rating]]",
        }
        for name, text in prompts.items()
    )
    _write(folder / "judge_prompts.jsonl", _json_lines(rows))


def _save_llama3(folder: Path) -> None:
    """A byte-level tokenizer with Llama 3's special tokens, and ends of marks joined with lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eot_id|>"),
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(">", "Ċ"), ("Ċ", "Ċ"), ("|", ">"), ("|>", "Ċ"), ("Ġ", "a")]
    words = [*special, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=TEMPLATES["llama-3-instruct"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _save_letters(folder: Path) -> None:
    """A tokenizer of letters, digits and a few marks: what else there is, it loses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = ["▁", *string.ascii_letters, *string.digits, *".,:;?!'\"-()\n"]
    words = ["<unk>", "<s>", "</s>", *characters, "▁a", "▁t"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[("▁", "a"), ("▁", "t")],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
