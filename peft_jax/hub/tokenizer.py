"""A checkpoint's tokenizer, as transformers reads it."""

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder; none of its code is ever run.

    Raises:
      ValueError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # transformers raises whatever its many tokenizers raise.
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {error}") from error
