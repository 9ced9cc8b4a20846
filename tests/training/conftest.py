"""Provides a tiny checkpoint, tokenizer, data, and configurations that finish in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from peft_jax.runtime.progress import Reporter
from peft_jax.training import RunConfig, default_config, from_config_dict
from peft_jax.training.report import plots

WORDS = [f"w{number}" for number in range(40)]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

ENCODER_WORDS = [*WORDS, "good", "bad"]


def _save_tokenizer(folder: Path) -> int:
    """Saves a tokenizer for `WORDS` and the data, and returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = ["<pad>", "</s>", "<unk>", *characters, *WORDS, "good", "bad"]
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session", autouse=True)
def compile_quickly():
    """Lowers compilation's optimization and caches all of it: it dominates the tests' time."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def empty_pictures():
    """Leaves the report's pictures empty, because drawing them takes a third of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", lambda figure, path: path.write_bytes(b""))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a Llama with 20,000 random weights in Hugging Face format."""
    from peft_jax.hub import save_model
    from peft_jax.models import build_model

    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_model({**LLAMA, "vocab_size": _save_tokenizer(folder)})
    save_model(folder, model, model.init_params(jax.random.key(0)))
    return folder


@pytest.fixture(scope="session")
def bert() -> dict[str, Any]:
    """Returns the configuration of a tiny BERT, without its vocabulary size."""
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }


@pytest.fixture(scope="session")
def encoder(bert: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a random BERT without a head, with a WordPiece tokenizer."""
    from safetensors.numpy import load_file, save_file
    from transformers import BertTokenizerFast

    from peft_jax.hub import save_model
    from peft_jax.models import build_classifier

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *ENCODER_WORDS]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    model = build_classifier({**bert, "vocab_size": len(words), "initializer_range": 0.2})
    save_model(folder, model, model.init_params(jax.random.key(0)))
    tensors = load_file(folder / "model.safetensors")
    kept = {n.removeprefix("bert."): t for n, t in tensors.items() if not n.startswith("classif")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def similar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns pairs of sentences with the share of common words as a number from 0 to 5."""
    folder = tmp_path_factory.mktemp("similar")
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("validation", 11)):
        rows = []
        for _ in range(count):
            one, other = rng.choice(WORDS[:8], (2, 4))
            score = round(1.2345 * len(set(one) & set(other)), 4)
            rows.append(
                {"sentence1": " ".join(one), "sentence2": " ".join(other), "label": min(score, 5)}
            )
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns instructions whose answer is the next word, and sentences that are good or bad."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "words").mkdir()
    random_words = random.Random(0)

    def rows(count: int) -> list[dict[str, Any]]:
        picked = [random_words.randrange(len(WORDS) - 2) for _ in range(count)]
        return [
            {"instruction": f"{WORDS[at]} {WORDS[at + 1]}", "input": "", "output": WORDS[at + 2]}
            for at in picked
        ]

    for name, count in (("train", 96), ("validation", 16)):
        lines = [json.dumps(row) for row in rows(count)]
        (folder / "words" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "sentiment").mkdir(exist_ok=True)
    for name, count in (("train", 64), ("dev", 10)):
        lines = ["sentence\tlabel"]
        lines += [
            f"{random_words.choice(WORDS)} {'good' if label else 'bad'}\t{label}"
            for label in (random_words.randrange(2) for _ in range(count))
        ]
        (folder / "sentiment" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, data: Path):
    """Returns a function that builds a tiny configuration with changes by dotted name."""

    def make(**changes: Any) -> RunConfig:
        config = default_config()
        settings = {
            "model.path": str(checkpoint),
            "method.name": "lora",
            "method.target_modules": "q_proj,down_proj",
            "data.recipe": "alpaca",
            "data.path": str(data / "words"),
            "data.prompt_template": "{instruction}",
            "data.completion_template": " {output}",
            "train.steps": 6,
            "train.batch_size": 4,
            "train.max_length": 16,
            "train.learning_rate": 0.02,
            "checkpoint.every": 2,
            "logging.tensorboard": False,
            "parallel.devices": 1,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        for name, value in settings.items():
            section, _, key = name.rpartition(".")
            holder = config
            for part in section.split(".") if section else []:
                holder = holder[part]
            holder[key] = value
        return from_config_dict(config)

    return make


class Listener(Reporter):
    """Records messages for a test."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True))
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.said.append(f"warning: {message}")

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@pytest.fixture
def listener() -> Listener:
    return Listener()
