"""Loads a checkpoint's tokenizer with transformers."""

from pathlib import Path
from typing import Any

from peft_jax.runtime.files import read_json_object

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that transformers assumes to be JSON objects, so that they are checked first."""


def load_tokenizer(folder: Path, *, chat_template: str | Path | None = None) -> Any:
    """Loads the tokenizer in a checkpoint's folder, without running any of its code.

    Args:
      folder: Folder of the checkpoint.
      chat_template: File with a Jinja chat template that replaces the tokenizer's own, also when
        the tokenizer is saved; None or empty to keep its own.

    Raises:
      ValueError: The tokenizer or the template cannot be loaded.
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
        # transformers lets errors of many types through from its tokenizers.
        said = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            said = f"{type(error).__name__}: {said}"
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {said}") from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def read_chat_template(file: str | Path) -> str:
    """Reads a Jinja chat template from a file.

    Raises:
      ValueError: The file does not exist or is not UTF-8 text.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the chat template {str(file)!r} cannot be read: {error}") from error
