"""A small tokenizer, made without files."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


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
