"""Expressions of others are matched as `re` matches them, and stopped where they never end."""

import re
import time

import pytest

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.core.patterns import compile_pattern
from peft_jax.models import build_model

NAME = "model.layers.0.self_attn.q_proj"
ENDLESS = "(.|.)*j.x"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r".*\.(k|v)_proj",
        r"model\.layers\.\d+\.self_attn\.[qk]_proj",
        r"(?i).*Q_PROJ",
        r"(.*\.)?(self_attn\.q_proj)",
        r".*(?<!v)_proj",
        r"(?P<letter>.).*(?P=letter)",
        "q_proj",
        "",
    ],
)
def test_the_result_is_that_of_re(pattern):
    assert compile_pattern(pattern).fullmatch(NAME) == bool(re.fullmatch(pattern, NAME))


@pytest.mark.parametrize("pattern", ["(", "*", "[", "(?R)", "(?<=a+)b", "(" * 5000 + ")" * 5000])
def test_what_re_does_not_take_is_refused_in_one_short_line(pattern):
    with pytest.raises(ValueError, match="is not a regular expression") as refused:
        compile_pattern(pattern)
    assert len(str(refused.value)) < 250


def test_an_endless_expression_is_stopped():
    model = build_model(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    )
    compile_pattern.cache_clear()
    start = time.process_time()
    for settings in (
        {"target_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"exclude_modules": ENDLESS},
    ):
        spec = AdapterSpec(method=LoRA(rank=1), **settings)
        with pytest.raises(ValueError, match=r"takes more than 2 seconds over"):
            spec.targets(model.abstract_params())
    assert time.process_time() - start < 60


def test_an_expression_of_any_length_is_not_compiled():
    with pytest.raises(ValueError, match="has 100,000 characters"):
        compile_pattern("a" * 100_000)
