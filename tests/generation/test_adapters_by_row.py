"""A batch whose rows use different adapters computes what each adapter computes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    AdapterSpec,
    LoRA,
    LoRAGA,
    approximate_by_lora,
    bind_adapters,
    by_row,
    stack_adapters,
)
from peft_jax.core import flatten
from peft_jax.generation import GenerationSettings, generate
from peft_jax.models import build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SPECS = {
    "one": AdapterSpec(LoRA(rank=3), target_modules=("q_proj", "down_proj")),
    "two": AdapterSpec(LoRA(rank=5, rank_stabilized=True), target_modules=("q_proj", "lm_head")),
    "three": AdapterSpec(LoRAGA(rank=2), rank_pattern={"v_proj": 1}),
}
ROWS = ("one", None, "three", "two", "one", "three", None, "two")


def draw(spec, params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.2, leaf.shape), leaf.dtype),
        spec.abstract(params),
    )


@pytest.fixture(scope="module")
def model():
    return build_model(LLAMA)


@pytest.fixture(scope="module")
def params(model):
    return model.init_params(jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(params):
    return {name: (spec, draw(spec, params, at)) for at, (name, spec) in enumerate(SPECS.items())}


@pytest.fixture(scope="module")
def stacked(params, adapters):
    return stack_adapters(params, adapters)


@pytest.mark.fast("True")
@pytest.mark.parametrize("multiply_all", [True, False])
def test_each_row_has_the_logits_of_its_adapter(
    multiply_all, model, params, adapters, stacked, monkeypatch
):
    monkeypatch.setattr(by_row, "prefer_all_adapters", lambda *shape: multiply_all)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (len(ROWS), 5)), jnp.int32)
    bound = stacked.bind(params, stacked.rows(ROWS))
    found = np.asarray(model(bound, tokens))
    for name in (None, *SPECS):
        rows = [at for at, other in enumerate(ROWS) if other == name]
        alone = bind_adapters(params, adapters, () if name is None else name)
        wanted = np.asarray(model(alone, tokens[np.array(rows)]))
        assert np.abs(found[rows] - wanted).max() < 1e-5 * np.abs(wanted).max()
    held = {id(leaf) for leaf in jax.tree.leaves(bound)}
    assert {id(leaf) for leaf in jax.tree.leaves(params)} <= held


@pytest.mark.slow
def test_prompts_are_continued_by_their_adapters(model, params, adapters, stacked):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 61, length) for length in (3, 9, 1, 5, 2, 8, 4, 7)]
    settings = GenerationSettings(max_new_tokens=6, eos_ids=(), batch_size=5)
    found = generate(model, params, prompts, settings, adapters=stacked, row_adapters=ROWS)
    wanted = {}
    for name in (None, *SPECS):
        rows = [at for at, other in enumerate(ROWS) if other == name]
        alone = bind_adapters(params, adapters, () if name is None else name)
        own = generate(model, alone, [prompts[at] for at in rows], settings)
        wanted |= dict(zip(rows, own.completions, strict=True))
    for at, completion in enumerate(found.completions):
        np.testing.assert_array_equal(completion.tokens, wanted[at].tokens)


def test_another_method_goes_by_row_once_it_is_a_lora(model, params):
    spec = AdapterSpec(BOFT(block_size=4, n_butterfly_factors=1), target_modules=("q_proj",))
    state = draw(spec, params, 0)
    with pytest.raises(ValueError, match=r"'mine' has the method 'boft'.*approximate_by_lora"):
        stack_adapters(params, {"mine": (spec, state)})
    lora = approximate_by_lora(spec, params, state, rank=24)
    stacked = stack_adapters(params, {"mine": (lora.spec, lora.state)})
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 5)), jnp.int32)
    found = model(stacked.bind(params, stacked.rows(["mine", None])), tokens)
    np.testing.assert_allclose(found[0], model(spec.bind(params, state), tokens)[0], atol=1e-3)
    np.testing.assert_allclose(found[1], model(params, tokens)[1], atol=1e-5)


def test_what_rows_cannot_use_is_rejected(model, params, adapters, stacked):
    saved = AdapterSpec(LoRA(rank=1), modules_to_save=("norm",))
    with pytest.raises(ValueError, match="'saved' trains norm in full"):
        stack_adapters(params, {"saved": (saved, draw(saved, params, 0))})
    with pytest.raises(ValueError, match="no adapter to stack"):
        stack_adapters(params, {})
    with pytest.raises(ValueError, match="no adapter 'tow'; did you mean 'two'"):
        stacked.rows(["tow"])
    with pytest.raises(ValueError, match="1 names, but there are 2 prompts"):
        generate(model, params, [[1], [2]], adapters=stacked, row_adapters=["one"])
    with pytest.raises(ValueError, match="adapters is None"):
        generate(model, params, [[1]], row_adapters=["one"])
    bound = stacked.bind(params, stacked.rows(["one", "two"]))
    with pytest.raises(ValueError, match="3 rows, but adapters are bound for 2"):
        model(bound, jnp.ones((3, 4), jnp.int32))
    kernel = flatten(bound)["layers", "self_attn", "q_proj", "kernel"]
    with pytest.raises(ValueError, match="cannot be merged"):
        kernel.method.merge(kernel.base[0], kernel.arrays)
