"""Tests that greedy decoding agrees with transformers, whatever the batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, Hybrid
from peft_jax.generation import GenerationSettings, from_tokens, generate
from peft_jax.models import ExecutionSettings
from peft_jax.parallel import LogicalAxisRules, MeshSettings, make_mesh, sharding_tree

FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral, short window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "bloom": ("Bloom", {}),
}
NEW = 20
GREEDY = GenerationSettings(max_new_tokens=NEW, eos_ids=())


def tokens_of(found):
    return [completion.tokens.tolist() for completion in found.completions]


def reasons_of(found):
    return [completion.finish_reason for completion in found.completions]


@pytest.mark.fast("bloom", "qwen3", "mistral, short window")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_agree_with_transformers(family, pair, prompts):
    kind, settings = FAMILIES[family]
    theirs, model, params = pair(kind, **settings)
    expected = [theirs.continue_greedily(prompt, NEW) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 4  # the texts are not constant
    found = generate(model, params, prompts, GREEDY)
    assert tokens_of(found) == expected
    assert reasons_of(found) == ["max_new_tokens"] * len(prompts)

    eos = expected[1][NEW // 2]
    found = generate(model, params, prompts, dataclasses.replace(GREEDY, eos_ids=(eos,)))
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert tokens_of(found) == ended
    assert reasons_of(found) == ["eos" if eos in row else "max_new_tokens" for row in ended]


def test_pretrained_model_agrees_with_transformers(published_data):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from peft_jax.hub import load_model

    folder = published_data / "models" / "tinystories656K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ["Once upon a time", "Lily and Tom went to the park. They"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected = []
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=140, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    assert any(row[-1] == tokenizer.eos_token_id for row in expected)
    found = generate(*load_model(folder), prompts, GenerationSettings(max_new_tokens=140))
    assert tokens_of(found) == expected


def test_completions_have_the_order_of_prompts(llama, prompts):
    _, model, params = llama
    longer = [prompt * 20 for prompt in prompts]
    mixed = [longer[0][:24], *prompts, *(prompt[:21] for prompt in longer[1:])]
    found = generate(model, params, mixed, dataclasses.replace(GREEDY, batch_size=4))
    expected = tokens_of(generate(model, params, prompts, GREEDY))
    assert tokens_of(found)[1:5] == expected
    assert found.stats.batches == 2
    assert found.stats.prompts == 8
    assert found.stats.prompt_tokens == sum(map(len, mixed))
    assert found.stats.new_tokens == 8 * NEW
    assert found.stats.tokens_per_second > 0


def test_bfloat16_tokens_are_the_likeliest_up_to_rounding(llama, prompts):
    _, model, params = llama
    narrow = model.with_execution(ExecutionSettings(compute_dtype="bfloat16"))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = tokens_of(generate(narrow, params, prompts, GREEDY))
    rows = np.zeros((len(prompts), 40), np.int32)
    for row, prompt, new in zip(rows, prompts, found, strict=True):
        row[: len(prompt) + NEW] = prompt + new
    # The model is causal, so that padding after a row's end has no effect.
    logits = np.asarray(jax.jit(narrow)(params, jnp.asarray(rows)))
    for seen, prompt, new in zip(logits, prompts, found, strict=True):
        before = seen[len(prompt) - 1 :][:NEW]
        lost = before.max(axis=1) - before[np.arange(NEW), new]
        assert np.all(lost < 0.02 * np.abs(before).max())


def test_bound_and_merged_adapters_agree(llama, prompts, key, monkeypatch):
    _, model, params = llama
    method = Hybrid(rank=2, block_size=4, gradient_init=False, unitary_modules=("down_proj",))
    spec = AdapterSpec(method=method, target_modules=("q_proj", "down_proj"))
    state = spec.init(key, params)
    leaves, treedef = jax.tree.flatten(state.trainable)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    state = dataclasses.replace(state, trainable=jax.tree.unflatten(treedef, moved))
    bound, merged = spec.bind(params, state), spec.merge(params, state)

    def refuse(*args, **kwargs):
        raise AssertionError("adapters must be prepared only once, when they are bound")

    monkeypatch.setattr(Hybrid, "prepare", refuse)
    found = tokens_of(generate(model, bound, prompts, GREEDY))
    assert found == tokens_of(generate(model, merged, prompts, GREEDY))
    assert found != tokens_of(generate(model, params, prompts, GREEDY))


def test_sharded_and_unsharded_parameters_agree(llama, prompts):
    _, model, params = llama
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    shardings = sharding_tree(
        model.logical_axes(), mesh, LogicalAxisRules(), model.abstract_params()
    )
    sharded = jax.device_put(params, shardings)
    expected = tokens_of(generate(model, params, prompts, GREEDY))
    assert tokens_of(generate(model, sharded, prompts, GREEDY)) == expected


def test_full_context_ends_a_continuation(llama, prompts):
    _, model, params = llama
    settings = GenerationSettings(max_new_tokens=125, eos_ids=())
    found = generate(model, params, prompts, settings)
    lengths = [len(row) for row in tokens_of(found)]
    assert lengths == [min(125, 128 - len(prompt)) for prompt in prompts]
    assert reasons_of(found) == ["max_new_tokens", "context", "context", "context"]


def test_end_tokens_of_the_configuration_are_the_default(llama, prompts):
    _, model, params = llama
    eos = generate(model, params, prompts, GREEDY).completions[1].tokens[3]
    ending = dataclasses.replace(
        model,
        hf_json=model.hf_json.replace(
            f'"eos_token_id": {model.hf_config["eos_token_id"]}', f'"eos_token_id": [0, {eos}]'
        ),
    )
    settings = GenerationSettings(max_new_tokens=NEW)
    found = generate(ending, params, prompts, settings).completions[1]
    assert found.finish_reason == "eos"
    assert found.tokens[-1] == eos


def test_stops_do_not_depend_on_the_interval(llama, prompts, monkeypatch):
    _, model, params = llama
    settings = GenerationSettings(max_new_tokens=125, eos_ids=())
    free = tokens_of(generate(model, params, prompts, settings))

    def stop_at(index, tokens):
        """Stops when the sum of the tokens reaches a bound that depends on the prompt."""
        reached = np.flatnonzero(np.cumsum(tokens) >= 350 * (1 + index))
        return int(reached[0]) + 1 if reached.size else None

    expected = [row[: stop_at(i, np.array(row))] for i, row in enumerate(free)]
    assert len({len(row) for row in expected}) > 2
    for interval in (1, 7, 32, 100):
        monkeypatch.setattr(from_tokens, "STOP_INTERVAL", interval)
        found = generate(model, params, prompts, settings, find_stop=stop_at)
        assert tokens_of(found) == expected
        assert reasons_of(found) == ["stop_string"] * len(prompts)


def test_no_prompts_give_no_completions(llama):
    _, model, params = llama
    found = generate(model, params, [])
    assert found.completions == ()
    assert found.stats.tokens_per_second == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 .*at least one token"),
        (np.ones((1, 2), int), r"prompt 1 .*\[1, 2\]"),
        ([5, 61], "prompt 1 .*token 61.* 60"),
        ([-1], "prompt 1 .*token -1"),
        ([3] * 128, "prompt 1 .*128 tokens.*context is 128"),
    ],
)
def test_invalid_prompts_are_rejected_by_index(llama, prompt, message):
    _, model, params = llama
    with pytest.raises(ValueError, match=message):
        generate(model, params, [[1], prompt])


def test_end_token_outside_the_vocabulary_is_rejected(llama):
    _, model, params = llama
    with pytest.raises(ValueError, match=r"eos_ids .*61"):
        generate(model, params, [[1]], GenerationSettings(eos_ids=(61,)))


def test_non_finite_logits_are_rejected(llama, prompts):
    _, model, params = llama
    broken = params | {"norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(FloatingPointError, match=r"logits .*not finite"):
        generate(model, broken, prompts, GREEDY)
