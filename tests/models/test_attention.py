"""Dense and chunked attention agree with a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.models.attention import choose_attention, dense_attention
from peft_jax.models.attention_layout import AttentionLayout, alibi_slopes
from peft_jax.models.chunked_attention import chunked_attention

B, K, G, H, V = 2, 2, 3, 4, 5
CASES = {
    "causal": {"tokens": 23, "keys": 23},
    "window": {"tokens": 23, "keys": 23, "window": 5},
    "window of one": {"tokens": 9, "keys": 9, "window": 1},
    "segments": {"tokens": 23, "keys": 23, "segments": True},
    "alibi": {"tokens": 22, "keys": 22, "segments": True, "alibi": True},
    "cache": {"tokens": 7, "keys": 40, "start": 9, "segments": True},
    "cache, window, alibi": {
        "tokens": 7,
        "keys": 40,
        "start": 21,
        "segments": True,
        "window": 6,
        "alibi": True,
    },
    "one query": {"tokens": 1, "keys": 17, "start": 12},
}


def make_case(*, tokens, keys, start=0, window=None, segments=False, alibi=False):
    """Returns (query, key, value), the layout, and the bias and mask added to the scores."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, tokens, K, G, H))
    key = rng.normal(size=(B, keys, K, H))
    value = rng.normal(size=(B, keys, K, V))
    segment_ids = np.sort(rng.integers(0, 4, (B, keys)), axis=1)
    positions = np.arange(keys) + np.array([[0], [3]])
    index = start + np.arange(tokens)
    seen = (index[:, None] >= np.arange(keys)) & np.ones((B, 1, 1), bool)
    if window is not None:
        seen &= index[:, None] - np.arange(keys) < window
    if segments:
        seen &= segment_ids[:, index, None] == segment_ids[:, None, :]
    bias = np.where(seen, 0.0, -np.inf)[:, None, None]
    slopes = alibi_slopes(K * G).astype(np.float64).reshape(K, G)
    if alibi:
        distance = positions[:, index, None] - positions[:, None, :]
        bias = bias - slopes[None, :, :, None, None] * distance[:, None, None]
    layout = AttentionLayout(
        query_start=jnp.int32(start),
        query_segments=jnp.asarray(segment_ids[:, index], jnp.int32) if segments else None,
        key_segments=jnp.asarray(segment_ids, jnp.int32) if segments else None,
        query_positions=jnp.asarray(positions[:, index], jnp.int32) if alibi else None,
        key_positions=jnp.asarray(positions, jnp.int32) if alibi else None,
        slopes=jnp.asarray(slopes, jnp.float32) if alibi else None,
        window=window,
    )
    return (query, key, value), layout, bias


def reference(query, key, value, bias):
    """Returns softmax attention in float64, with repeated keys and values, [B, T, K, G, V]."""
    key, value = (np.repeat(a, G, axis=2).transpose(0, 2, 1, 3) for a in (key, value))
    scores = query.reshape(B, -1, K * G, H).transpose(0, 2, 1, 3) @ key.transpose(0, 1, 3, 2)
    scores = scores + np.broadcast_to(bias, (B, K, G, *scores.shape[2:])).reshape(scores.shape)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = weights / weights.sum(axis=-1, keepdims=True) @ value
    return out.transpose(0, 2, 1, 3).reshape(*query.shape[:-1], V)


def as_float32(arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("case", CASES)
def test_both_implementations_compute_softmax_attention(case):
    sizes = {name: CASES[case][name] for name in ("tokens", "keys")}
    arrays, layout, bias = make_case(**CASES[case])
    expected = reference(*arrays, bias)
    attends = {
        "dense": dense_attention(layout, **sizes),
        "blocks of 4": chunked_attention(layout, **sizes, block=4),
        "one block": chunked_attention(layout, **sizes),
    }
    for name, attend in attends.items():
        found = jax.jit(attend)(*as_float32(arrays))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("case", ["window", "alibi"])
def test_chunked_gradients_equal_dense_gradients(case):
    sizes = {name: CASES[case][name] for name in ("tokens", "keys")}
    arrays, layout, _ = make_case(**CASES[case])
    direction = np.random.default_rng(1).normal(size=(*arrays[0].shape[:-1], V))

    def gradients(attend):
        def objective(*arrays):
            return jnp.vdot(jnp.asarray(direction, jnp.float32), attend(*arrays))

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(*as_float32(arrays))

    expected = gradients(dense_attention(layout, **sizes))
    found = gradients(chunked_attention(layout, **sizes, block=4))
    for name, a, b in zip(("query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_chunked_gradients_agree_with_finite_differences():
    arrays, layout, bias = make_case(**CASES["segments"])
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(*arrays[0].shape[:-1], V))
    steps = [rng.normal(size=a.shape) for a in arrays]
    attend = chunked_attention(layout, tokens=23, keys=23, block=8)

    def objective(*arrays):
        return jnp.vdot(jnp.asarray(direction, jnp.float32), attend(*arrays))

    gradients = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(*as_float32(arrays))
    found = sum(np.vdot(g, s) for g, s in zip(gradients, steps, strict=True))

    def value_after(step):
        moved = (a + step * s for a, s in zip(arrays, steps, strict=True))
        return np.vdot(direction, reference(*moved, bias))

    expected = (value_after(1e-6) - value_after(-1e-6)) / 2e-6
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16_attention_computes_the_softmax_in_float32():
    arrays, layout, bias = make_case(tokens=64, keys=64)
    expected = reference(*arrays, bias)
    for attend in (
        dense_attention(layout, tokens=64, keys=64),
        chunked_attention(layout, tokens=64, keys=64, block=16),
    ):
        found = attend(*(a.astype(jnp.bfloat16) for a in as_float32(arrays)))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05)


def test_alibi_slopes_of_six_heads_equal_the_authors():
    # The authors' code gives 6 heads the slopes of 4 heads, then every other slope of 8 heads.
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    np.testing.assert_allclose(alibi_slopes(6), expected, rtol=1e-6)


def test_auto_prefers_fused_else_decides_by_the_number_of_scores():
    on_cpu = {"why_not_fused": "it needs a GPU"}
    assert choose_attention("auto", tokens=1024, keys=1024, **on_cpu) == "dense"
    assert choose_attention("auto", tokens=1025, keys=1024, **on_cpu) == "chunked"
    assert choose_attention("auto", tokens=2, keys=2, why_not_fused=None) == "fused"
    assert choose_attention("dense", tokens=10**6, keys=10**6, why_not_fused=None) == "dense"
    assert choose_attention("chunked", tokens=2, keys=2, why_not_fused=None) == "chunked"
    with pytest.raises(ValueError, match=r"attention='fused'.*it needs a GPU"):
        choose_attention("fused", tokens=2, keys=2, **on_cpu)


@pytest.mark.parametrize("case", ["window", "segments", "cache"])
@pytest.mark.parametrize("make", [dense_attention, chunked_attention], ids=["dense", "chunked"])
def test_sinks_take_part_in_the_softmax_without_a_value(make, case):
    sizes = {name: CASES[case][name] for name in ("tokens", "keys")}
    arrays, layout, bias = make_case(**CASES[case])
    blocks = {} if make is dense_attention else {"block": 8}
    generator = np.random.default_rng(1)
    arrays = as_float32((*arrays, 2.0 * generator.normal(size=(K, G))))
    weights = jnp.asarray(generator.normal(size=(*arrays[0].shape[:-1], V)), jnp.float32)

    def written_out(query, key, value, sinks):
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key) + jnp.asarray(bias, jnp.float32)
        sink = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        joined = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", joined[..., :-1], value)

    def with_gradients(attend):
        def loss(*arrays):
            out = attend(*arrays)
            return jnp.sum(weights * out), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)

    found = with_gradients(make(layout, **sizes, **blocks))
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(with_gradients(written_out)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)
