"""Several adapters over one base, beside Hugging Face PEFT's on torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    COMBINATION_TYPES,
    AdapterSpec,
    Hybrid,
    LoRA,
    LoRAGA,
    bind_adapters,
    combine_adapters,
    task_arithmetic,
)
from peft_jax.commands import combine
from peft_jax.core import flatten
from peft_jax.hub import load_adapter, save_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

DENSITY = 0.6
WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}
SPECS = {
    "one": AdapterSpec(LoRA(rank=3, alpha=5.0), target_modules=("q_proj", "down_proj")),
    "two": AdapterSpec(LoRA(rank=3, alpha=2.0), target_modules=("q_proj", "v_proj")),
    "three": AdapterSpec(
        LoRA(rank=3, rank_stabilized=True), target_modules=("down_proj", "v_proj")
    ),
}
OTHER_RANK = SPECS["two"], dataclasses.replace(SPECS["two"], method=LoRA(rank=2, alpha=2.0))


def draw(spec, params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype),
        spec.abstract(params),
    )


@pytest.fixture(scope="module")
def adapters(base):
    """Three LoRA adapters over overlapping modules."""
    params = base("llama").params
    return {name: (spec, draw(spec, params, at)) for at, (name, spec) in enumerate(SPECS.items())}


@pytest.fixture(scope="module")
def on_torch(base, adapters, tmp_path_factory):
    """PEFT's model with the same adapters."""
    base, folder = base("llama"), tmp_path_factory.mktemp("adapters")
    for name, (spec, state) in adapters.items():
        save_adapter(folder / name, base.model, spec, state, "someone/base")
    first, *others = adapters
    module = peft.PeftModel.from_pretrained(
        base.copy_of_module(), folder / first, adapter_name=first
    )
    for name in others:
        module.load_adapter(folder / name, adapter_name=name)
    return module.eval()


def theirs(module, tokens):
    with torch.no_grad():
        return module(input_ids=torch.tensor(tokens)).logits.numpy()


def ours(base, bound, tokens):
    return np.asarray(base.model(bound, jnp.asarray(tokens, jnp.int32)))


def assert_near(found, wanted):
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_switching_disabling_and_stacking_are_those_of_peft(base, adapters, on_torch, tokens):
    base = base("llama")
    for name in ("one", "two"):
        on_torch.set_adapter(name)
        bound = bind_adapters(base.params, adapters, name)
        assert_near(ours(base, bound, tokens), theirs(on_torch, tokens))
    with on_torch.disable_adapter():
        wanted = theirs(on_torch, tokens)
    assert_near(ours(base, bind_adapters(base.params, adapters), tokens), wanted)
    on_torch.base_model.set_adapter(["one", "two"])
    stacked = bind_adapters(base.params, adapters, ("one", "two"))
    assert_near(ours(base, stacked, tokens), theirs(on_torch, tokens))
    leaves = {id(leaf) for leaf in jax.tree.leaves(stacked)}
    assert {id(leaf) for leaf in jax.tree.leaves(base.params)} <= leaves


@pytest.fixture
def same_masks(monkeypatch):
    """Prunes here and in PEFT by the values themselves, in place of random numbers."""

    def prune(tensor, density, rescale):
        kept = (tensor.abs() * 1e3).remainder(1.0) < density
        return tensor * kept / (density if rescale else 1.0)

    def kept(tasks, density, key):
        del key
        return (jnp.mod(jnp.abs(tasks) * 1e3, 1.0) < density).astype(tasks.dtype)

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", prune)
    monkeypatch.setattr(task_arithmetic, "kept_at_random", kept)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.fast("cat", "linear", "svd")
@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.usefixtures("same_masks")
def test_combinations_are_those_of_peft(kind, base, adapters, on_torch, tokens):
    base = base("llama")
    prunes = kind not in ("cat", "linear", "svd")
    settings = {"density": DENSITY} if prunes else {}
    if kind.endswith("ties"):
        settings["majority_sign_method"] = "frequency"
    if kind.endswith("svd"):
        settings["svd_rank"] = 4
    on_torch.base_model.set_adapter("one")
    on_torch.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), kind, combination_type=kind, **settings
    )
    on_torch.set_adapter(kind)
    spec, state = combine_adapters(base.params, adapters, WEIGHTS, kind, **settings)
    assert spec.method.rank == on_torch.peft_config[kind].r
    found = base.adapted_logits(tokens, spec, state)
    if kind.startswith("dare") and kind.endswith("svd"):
        # The masks are of values that differ in their last bits here and there.
        assert np.mean(np.abs(found - theirs(on_torch, tokens))) < 0.3
    else:
        assert_near(found, theirs(on_torch, tokens))


def test_one_adapter_is_scaled(base, adapters):
    params = base("llama").params
    spec, state = combine_adapters(params, adapters, {"two": -0.5}, "svd")
    changes = [
        jax.tree.map(jnp.subtract, s.merge(params, a), params)
        for s, a in (adapters["two"], (spec, state))
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, -0.5 * x, atol=1e-5), *changes)


@pytest.mark.slow
def test_differences_of_every_method_are_combined(base):
    params = base("llama").params
    specs = {
        "lora_ga": AdapterSpec(LoRAGA(rank=2)),
        "boft": AdapterSpec(BOFT(block_size=4)),
        "hybrid": AdapterSpec(Hybrid(rank=2, block_size=4)),
    }
    adapters = {name: (spec, draw(spec, params, 0)) for name, spec in specs.items()}
    weights = {"lora_ga": 1.0, "boft": 0.5, "hybrid": -0.5}
    spec, state = combine_adapters(params, adapters, weights, "svd", svd_rank=16)
    wanted = {
        path: sum(
            weights[name] * np.asarray(flatten(s.merge(params, a))[path] - leaf, np.float64)
            for name, (s, a) in adapters.items()
        )
        for path, leaf in flatten(params).items()
    }
    for path, leaf in flatten(spec.merge(params, state)).items():
        change = np.asarray(leaf - flatten(params)[path])
        np.testing.assert_allclose(change, wanted[path], atol=1e-4)


def test_pruning_at_random_keeps_the_mean(key):
    tasks = jnp.ones((2, 100, 100))
    pruned = task_arithmetic.keep_random(tasks, 0.25, key)
    assert set(np.unique(pruned)) == {0.0, 4.0}
    assert np.mean(pruned) == pytest.approx(1.0, abs=0.05)


def refused(base, adapters):
    """Pairs of a call that is rejected and its message."""
    params = base.params
    saved = AdapterSpec(LoRA(rank=3), target_modules=("q_proj",), modules_to_save=("norm",))
    boft = AdapterSpec(BOFT(block_size=4), target_modules=("q_proj",))
    rank = OTHER_RANK[1]
    more = {
        **adapters,
        "saved": (saved, draw(saved, params, 1)),
        "saved too": (saved, draw(saved, params, 2)),
        "boft": (boft, draw(boft, params, 3)),
        "rank 2": (rank, draw(rank, params, 4)),
        "wrong": (rank, adapters["two"][1]),
    }

    def combine(names, *given, **settings):
        weights = dict.fromkeys(names, 1.0)
        return lambda: combine_adapters(params, more, weights, *given, **settings)

    return {
        "unknown": (combine(["on"]), "no adapter 'on'; did you mean 'one'"),
        "nothing": (combine([]), "weights is empty"),
        "type": (combine(["one"], "sum"), "combination_type is 'sum'"),
        "ranks": (combine(["one", "rank 2"], "linear"), "'one' has 3, 'rank 2' has 2.*'cat'"),
        "method": (combine(["one", "boft"], "ties", density=0.5), "'boft'.*has no.*svd"),
        "svd": (combine(["one", "boft"], "svd"), "'boft'.*give svd_rank"),
        "saved": (combine(["one", "saved"], "cat"), "'saved' trains norm in full"),
        "density": (combine(["one", "two"], "ties"), "density is None.*above 0"),
        "no density": (combine(["one", "two"], "cat", density=0.5), "prunes nothing"),
        "svd_rank": (combine(["one", "two"], "cat", svd_rank=2), "svd_rank is 2"),
        "shapes": (combine(["one", "wrong"], "cat"), r"'wrong' does not fit.*is \[2, 16, 3\]"),
        "leaf": (
            lambda: bind_adapters(params, more, ("saved", "saved too")),
            "'saved too' trains norm.*'saved' changes too",
        ),
        "twice": (lambda: bind_adapters(params, more, ("one", "one")), "named twice"),
    }


def test_what_does_not_go_together_is_rejected_by_name(base, adapters):
    for call, message in refused(base("llama"), adapters).values():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_combined_adapter_is_saved_and_loaded(base, adapters, tokens, tmp_path):
    base = base("llama")
    spec, state = combine_adapters(base.params, adapters, WEIGHTS, "cat")
    save_adapter(tmp_path, base.model, spec, state, "someone/base")
    found = base.adapted_logits(tokens, *load_adapter(tmp_path, base.model, base.params))
    assert_near(found, base.adapted_logits(tokens, spec, state))


def test_the_command_rejects_other_bases_and_missing_weights(base, adapters, tmp_path, capsys):
    line = []
    for name, kind in (("one", "llama"), ("two", "llama tied")):
        one = base(kind)
        save_adapter(tmp_path / name, one.model, *adapters[name], one.model.origin)
        line += [f"--adapter={tmp_path / name}", f"--weight={WEIGHTS[name]}"]
    output = f"--output={tmp_path / 'out'}"
    with pytest.raises(SystemExit) as left:
        combine.main([output])
    assert left.value.code == 2
    assert "--adapter, --weight" in capsys.readouterr().err
    assert combine.main([*line[:3], output]) == 2
    assert "2 of --adapter but 1 of --weight" in capsys.readouterr().err
    assert combine.main([*line, output]) == 2
    assert "adapters of one base go together" in capsys.readouterr().err
