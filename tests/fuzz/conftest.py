"""Provides a tiny model and a tokenizer for fuzz tests."""

from typing import Any

import jax
import pytest
from fuzzing import LLAMA


@pytest.fixture(scope="session")
def base() -> tuple[Any, Any]:
    """Returns a tiny model and its parameters."""
    from peft_jax.models import build_model

    model = build_model(LLAMA)
    return model, model.init_params(jax.random.key(0))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Returns a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
