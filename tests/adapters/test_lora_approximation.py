"""Adapters of any method as LoRA, beside a singular value decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import (
    BOFT,
    AdapterSpec,
    Full,
    Hybrid,
    LoRA,
    LoRAGA,
    Unitary,
    approximate_by_lora,
)
from peft_jax.core import flatten, join_path

HYBRID = Hybrid(rank=2, block_size=4)


def arbitrary(spec, params):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.2, leaf.shape), leaf.dtype),
        spec.abstract(params),
    )


def differences(spec, params, state):
    """Returns what merging changes, by module, in float64."""
    merged, base = flatten(spec.merge(params, state)), flatten(params)
    return {
        join_path(path[:-1]): np.asarray(merged[path], np.float64) - np.asarray(base[path])
        for path in spec.targets(params).adapted
    }


@pytest.mark.fast("hybrid-3")
@pytest.mark.parametrize(
    ("method", "rank"),
    [(HYBRID, 3), (HYBRID, 24), (BOFT(block_size=2), 3), (Unitary(), 3)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_factors_are_nearly_the_best_of_their_rank(method, rank, llama_params):
    spec = AdapterSpec(method, target_modules=("v_proj", "down_proj"))
    state = arbitrary(spec, llama_params)
    found = approximate_by_lora(spec, llama_params, state, rank=rank)
    exact = differences(spec, llama_params, state)
    ours = differences(found.spec, llama_params, found.state)
    assert exact.keys() == found.errors.keys()
    for module, wanted in exact.items():
        norm = np.linalg.norm(wanted)
        singular = np.linalg.svd(wanted, compute_uv=False)
        best = np.sqrt(np.sum(singular[:, rank:] ** 2)) / norm
        error = np.linalg.norm(ours[module] - wanted) / norm
        assert error <= 1.02 * best + 1e-5
        assert found.errors[module] == pytest.approx(error, rel=0.05, abs=1e-5)


@pytest.mark.parametrize("method", [LoRA(rank=3, alpha=5.0), LoRAGA(rank=2)], ids=lambda m: m.name)
def test_low_rank_products_are_converted_exactly(method, llama_params):
    spec = AdapterSpec(
        method, target_modules=("q_proj", "up_proj"), modules_to_save=("norm", "lm_head")
    )
    state = arbitrary(spec, llama_params)
    found = approximate_by_lora(spec, llama_params, state, rank=6)
    assert set(found.errors.values()) == {0.0}
    merged = [s.merge(llama_params, a) for s, a in ((spec, state), (found.spec, found.state))]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *merged)


def test_a_low_rank_product_of_larger_rank_is_truncated(llama_params):
    spec = AdapterSpec(LoRA(rank=5), target_modules=("k_proj",))
    state = arbitrary(spec, llama_params)
    found = approximate_by_lora(spec, llama_params, state, rank=2)
    ((_, wanted),) = differences(spec, llama_params, state).items()
    singular = np.linalg.svd(wanted, compute_uv=False)
    best = np.sqrt(np.sum(singular[:, 2:] ** 2)) / np.linalg.norm(wanted)
    assert found.errors["layers.self_attn.k_proj"] == pytest.approx(best, rel=1e-3)


def test_an_untrained_adapter_has_no_error(llama_params):
    spec = AdapterSpec(BOFT(block_size=4), target_modules=("q_proj",))
    state = spec.init(jax.random.key(0), llama_params)
    found = approximate_by_lora(spec, llama_params, state, rank=2)
    assert found.errors["layers.self_attn.q_proj"] == 0.0
    assert not np.any(found.state.trainable["layers"]["self_attn"]["q_proj"]["kernel"]["b"])


def test_what_is_no_adapter_is_rejected(llama_params):
    spec = AdapterSpec(Full())
    with pytest.raises(ValueError, match="'full' trains whole leaves or rows"):
        approximate_by_lora(spec, llama_params, spec.abstract(llama_params), rank=2)
