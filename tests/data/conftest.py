"""Tokenizers for tests: small ones built here, and real ones from the shared data."""

from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import make_tokenizer
from transformers import AutoTokenizer


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
    """Returns a tokenizer without tokens for some characters."""
    folder = shared_data / "tokenizers" / "letters"
    if not folder.is_dir():
        folder = shared_data / "models" / "tinystories656K"
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
