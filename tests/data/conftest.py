"""Tokenizers for the tests: small ones made here, and real ones of the shared data."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def make_tokenizer(*, bos: bool = True, eos: bool = True, trim_offsets: bool = False) -> Any:
    """A byte-level tokenizer that joins a space with a letter, so that its tokens cross borders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    space = "Ġ"
    merges = [(space, letter) for letter in "abcdefghijklmnopqrstuvwxyzP"] + [(space, space)]
    words = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.post_processor = byte_level
    if bos:
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.post_processor = processors.Sequence([byte_level, begin])
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama3(shared_data: Path) -> Any:
    folder = shared_data / "tokenizers" / "llama3"
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tinystories(shared_data: Path) -> Any:
    """A tokenizer that has no tokens for some characters."""
    folder = shared_data / "tokenizers" / "letters"
    if not folder.is_dir():
        folder = shared_data / "models" / "tinystories656K"
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
