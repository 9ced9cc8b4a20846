"""A checkpoint's tokenizer, as transformers reads it."""

from pathlib import Path
from typing import Any

from peft_jax.runtime.files import read_json_object

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that transformers takes for JSON objects, whatever is in them."""


def load_tokenizer(folder: Path, *, chat_template: str | Path | None = None) -> Any:
    """The tokenizer in a checkpoint's folder; none of its code is ever run.

    Args:
      folder: the checkpoint's.
      chat_template: a file with a Jinja chat template, which takes the place of the tokenizer's
        own, also where the tokenizer is saved; None or empty: its own.

    Raises:
      ValueError: there is none that can be loaded, or no such template.
    """
    from transformers import AutoTokenizer

    template = read_chat_template(chat_template) if chat_template else None
    for name in _SETTINGS:
        if (folder / name).is_file():
            read_json_object(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # transformers raises whatever its many tokenizers raise.
        said = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            said = f"{type(error).__name__}: {said}"
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {said}") from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def read_chat_template(file: str | Path) -> str:
    """The Jinja chat template in a file.

    Raises:
      ValueError: there is no such file, or it is no text in UTF-8.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the chat template {str(file)!r} cannot be read: {error}") from error
