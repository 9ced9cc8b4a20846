"""EVA's start agrees with Hugging Face PEFT's on torch, over the same rows."""

import numpy as np
import pytest

from peft_jax.adapters import EVA, AdapterSpec, LoRA, redistribute_ranks
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.hub.adapter_arrays import modules_of
from peft_jax.training.program import StartLoss

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# The sketch is as wide as the kernels, and exact.
RANK = 8
MODULES = ("q_proj", "k_proj", "down_proj")


@pytest.fixture(scope="module")
def rows():
    """Returns rows of which some have padding, and some a part without a loss."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 37, (6, 20))
    mask = rng.random(tokens.shape) < 0.8
    return Batch.from_tokens(tokens, mask=mask, lengths=[20, 13, 17, 20, 9, 20])


@pytest.fixture(scope="module")
def start(base):
    """Returns the loss that starts an adapter."""
    return StartLoss(model=base("llama").model, chunk_size=64, packed=False, loss_fn=None)


@pytest.fixture(scope="module")
def in_peft(base, rows):
    """Returns a function that starts EVA in PEFT, and returns its module."""

    def make(rho: float):
        # PEFT counts the positions that have a label themselves.
        labels = np.where(rows.loss_mask > 0, rows.tokens, -100).astype(np.int64)
        batch = {
            "input_ids": torch.tensor(rows.tokens),
            "attention_mask": torch.tensor(rows.segment_ids),
            "labels": torch.tensor(labels),
        }
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=16,
            target_modules=list(MODULES),
            init_lora_weights="eva",
            # Repeats the batch until the components stay the same.
            eva_config=peft.EvaConfig(rho=rho, tau=0.9999999),
        )
        module = peft.get_peft_model(base("llama").copy_of_module(), config)
        peft.initialize_lora_eva_weights(module, [batch], show_progress_bar=False)
        return module

    return make


def directions_of(module):
    """Returns the rows of every A of a PEFT model, by the module's name in the base."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): weight
        for name, parameter in module.named_parameters()
        if name.endswith("lora_A.default.weight")
        for weight in [parameter.detach().numpy()]
    }


def check_same(spec, state, base, theirs):
    """Asserts that the columns of A agree up to their signs."""
    found = set()
    for path, method in spec.targets(base.params).adapted.items():
        a = np.asarray(flatten(state.trainable)[(*path, "a")])
        names = modules_of(base.model, path)
        layers = spec.targets(base.params).layers(path, len(names))
        assert isinstance(method, EVA)
        for layer, (name, own) in enumerate(zip(names, layers, strict=True)):
            if own is None:
                continue
            found.add(name)
            ours = a[layer][:, : own.rank].T
            assert np.all(a[layer][:, own.rank :] == 0)
            signs = np.sign(np.sum(ours * theirs[name], axis=1, keepdims=True))
            np.testing.assert_allclose(ours * signs, theirs[name], atol=2e-4)
    assert found == set(theirs)


@pytest.mark.filterwarnings("ignore:.*lora:UserWarning")
def test_start_agrees_with_peft(base, rows, start, in_peft, key):
    spec = AdapterSpec(method=EVA(rank=RANK, alpha=16.0), target_modules=MODULES)
    state = spec.init(key, base("llama").params, loss_fn=start, batches=[(rows, np.float32(1.0))])
    assert all(not leaf.any() for path, leaf in flatten(state.trainable).items() if path[-1] == "b")
    check_same(spec, state, base("llama"), directions_of(in_peft(rho=1.0)))


def test_redistributed_ranks_agree_with_peft(base, rows, start, in_peft, key):
    batches = [(rows, np.float32(1.0))]
    given = AdapterSpec(method=EVA(rank=RANK, alpha=16.0), target_modules=MODULES)
    params = base("llama").params
    spec = redistribute_ranks(given, key, params, loss_fn=start, batches=batches, rho=1.5)
    state = spec.init(key, params, loss_fn=start, batches=batches)
    module = in_peft(rho=1.5)
    theirs = directions_of(module)
    assert {len(rows) for rows in theirs.values()} != {RANK}
    check_same(spec, state, base("llama"), theirs)
    # The scale s stays the same in every layer.
    scales = [
        one.scale for layers in spec.targets(params).by_layer.values() for one in layers if one
    ]
    np.testing.assert_allclose(scales, 2.0, rtol=1e-6)
    assert (
        redistribute_ranks(given, key, params, loss_fn=start, batches=batches, rho=1.0).rank_pattern
        == {}
    )


def test_only_eva_has_ranks_to_redistribute(base, start, key):
    spec = AdapterSpec(method=LoRA(rank=RANK))
    with pytest.raises(ValueError, match="must be eva"):
        redistribute_ranks(spec, key, base("llama").params, loss_fn=start, batches=[1])
    spec = AdapterSpec(method=EVA(rank=RANK))
    with pytest.raises(ValueError, match=r"rho is 0\.5"):
        redistribute_ranks(spec, key, base("llama").params, loss_fn=start, batches=[1], rho=0.5)


def test_inputs_that_are_not_the_positions_of_a_batch_are_rejected(base, rows, start, key):
    spec = AdapterSpec(method=EVA(rank=RANK), target_modules=("lm_head",))
    short = StartLoss(model=start.model, chunk_size=8, packed=False, loss_fn=None)
    with pytest.raises(ValueError, match=r"inputs of lm_head .*exclude the module"):
        spec.init(key, base("llama").params, loss_fn=short, batches=[(rows, np.float32(1.0))])
