"""Provides tiny random transformers models, the same models in JAX, and a small tokenizer."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BLOOM_SIZES = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
SPACE = "▁"
WORDS = [*SPECIALS, SPACE, *string.ascii_lowercase, *"?.:", "th", "the", SPACE + "the"]
"""Vocabulary of the small tokenizer."""
TEMPLATE = (
    "<s>{% for message in messages %}{{ message.role[0] }}:{{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)

PROMPT_LENGTHS = (1, 19, 7, 12)


class TorchModel:
    """A transformers model with random float32 parameters."""

    def __init__(self, module: Any):
        self.module = module.eval()

    @classmethod
    def random(cls, kind: str, **settings: Any) -> "TorchModel":
        import torch
        import transformers

        sizes = BLOOM_SIZES if kind == "Bloom" else SIZES
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
        config._attn_implementation = "eager"
        model = cls(getattr(transformers, f"{kind}ForCausalLM")(config))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1.0 + 0.2 * noise if is_scale else 0.3 * noise)
        return model

    def continue_greedily(self, prompt: Sequence[int], count: int) -> list[int]:
        """Returns the new tokens of transformers' greedy decoding of one prompt."""
        import torch

        tokens = torch.tensor(np.asarray(prompt)[None], dtype=torch.long)
        out = self.module.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    def probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the probabilities of the next token, float64 [V]."""
        import torch

        with torch.no_grad():
            logits = self.module(torch.tensor([list(tokens)])).logits[0, -1].double()
        return torch.softmax(logits, dim=-1).numpy()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable:
    """Returns a cached function that builds (torch model, JAX model, parameters)."""
    from peft_jax.hub import load_model

    made: dict = {}

    def make(kind: str, **settings):
        key = (kind, repr(sorted(settings.items())))
        if key not in made:
            theirs = TorchModel.random(kind, **settings)
            folder = tmp_path_factory.mktemp(kind)
            theirs.module.save_pretrained(folder)
            made[key] = (theirs, *load_model(folder))
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(pair):
    """Returns the pair that most tests use, with grouped queries and a tied head."""
    return pair("Llama", num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Returns prompts of different lengths in the tiny models' vocabulary."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 61, length).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="session")
def tokenizer():
    """Returns a tokenizer of letters and a word that, as SentencePiece, prepends a space."""
    merges = [("t", "h"), ("th", "e"), (SPACE, "the")]
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def speaker(pair):
    """Returns a random model with the tokenizer's vocabulary."""
    _, model, params = pair("Llama", vocab_size=len(WORDS), num_key_value_heads=2)
    return model, params
