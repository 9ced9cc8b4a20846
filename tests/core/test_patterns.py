"""Tests that users' regular expressions match as in `re`, but within a time limit."""

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
def test_result_equals_that_of_re(pattern):
    assert compile_pattern(pattern).fullmatch(NAME) == bool(re.fullmatch(pattern, NAME))


@pytest.mark.parametrize("pattern", ["(", "*", "[", "(?R)", "(?<=a+)b", "(" * 5000 + ")" * 5000])
def test_invalid_expression_is_rejected_in_one_short_line(pattern):
    with pytest.raises(ValueError, match="regular expression") as rejected:
        compile_pattern(pattern)
    assert len(str(rejected.value)) < 250


def test_exponential_expression_is_stopped():
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
        with pytest.raises(ValueError, match=r"more than 2 seconds"):
            spec.targets(model.abstract_params())
    assert time.process_time() - start < 60


def test_too_long_expression_is_rejected():
    with pytest.raises(ValueError, match="100,000"):
        compile_pattern("a" * 100_000)
