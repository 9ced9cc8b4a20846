"""Tests chunked cross-entropy against float64 NumPy and against dense gradients."""

import functools

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.dispatch import use_implementation
from peft_jax.adapters import LoRA
from peft_jax.core import AdaptedKernel
from peft_jax.cost import estimate_program, network_of, read_program
from peft_jax.models.logit_rule import LogitRule
from peft_jax.parallel import MeshSettings, make_mesh, on_mesh
from peft_jax.training.losses import chunked_cross_entropy, chunked_token_scores


def problem(tokens=24, embed=8, vocab=50, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, embed)).astype(dtype)
    head = rng.standard_normal((embed, vocab)).astype(dtype)
    targets = rng.integers(0, vocab, tokens).astype(np.int32)
    weights = np.where(rng.random(tokens) < 0.3, 0.0, rng.random(tokens)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights)


def in_numpy(hidden, head, targets, weights):
    """Returns loss, its gradients of hidden states and head, and per-token losses in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    top = logits.max(-1, keepdims=True)
    log_normalizer = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    log_probabilities = logits - log_normalizer
    losses = -log_probabilities[np.arange(len(targets)), targets]
    gradient = np.exp(log_probabilities)
    gradient[np.arange(len(targets)), targets] -= 1.0
    gradient *= weights[:, None]
    return np.sum(weights * losses), gradient @ head.T, hidden.T @ gradient, losses


def dense(hidden, head, targets, weights):
    """Returns the loss in JAX, with all logits at once."""
    log_probabilities = jax.nn.log_softmax(hidden @ head)
    chosen = jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
    return -jnp.sum(chosen * weights)


@functools.partial(jax.jit, static_argnames="chunk_size")
def loss_and_gradients(hidden, head, targets, weights, chunk_size):
    def loss(hidden, head, weights):
        return chunked_cross_entropy(hidden, head, targets, weights, chunk_size=chunk_size)[0]

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, head, weights)


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 24, 1000])
@pytest.mark.parametrize("tokens", [24, 23])
def test_loss_and_gradients_agree_with_numpy(tokens, chunk_size):
    hidden, head, targets, weights = problem(tokens=tokens)
    wanted = in_numpy(hidden, head, targets, weights)
    loss, gradients = loss_and_gradients(hidden, head, targets, weights, chunk_size)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-6)
    for found, expected in zip(gradients, wanted[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


RULES = {"cap": (1.0, 2.0), "divisor": (4.0, None), "both": (0.5, 3.0)}


@pytest.mark.parametrize("rule", RULES)
def test_loss_gradients_and_scores_follow_the_logit_rule(rule):
    hidden, head, targets, weights = problem()
    divisor, cap = RULES[rule]
    rule = LogitRule(divisor=divisor, cap=cap)

    def logits_of(hidden, head):
        scaled = hidden @ head / divisor
        return scaled if cap is None else cap * jnp.tanh(scaled / cap)

    def reference(hidden, head):
        log_probabilities = jax.nn.log_softmax(logits_of(hidden, head))
        chosen = jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
        return -jnp.sum(chosen * weights)

    def chunked(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, weights, chunk_size=7, logit_rule=rule)[
            0
        ]

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)),
        jax.tree.leaves(jax.value_and_grad(reference, argnums=(0, 1))(hidden, head)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    scores, _ = chunked_token_scores(hidden, head, targets, chunk_size=7, logit_rule=rule)
    expected = jax.nn.log_softmax(logits_of(hidden, head))[jnp.arange(24), targets]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@hypothesis.given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 70),
    chunk_size=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(max_examples=6, deadline=None)
def test_loss_agrees_for_any_shape(tokens, vocab, chunk_size, seed):
    hidden, head, targets, weights = problem(tokens=tokens, vocab=vocab, seed=seed)
    wanted = in_numpy(hidden, head, targets, weights)
    compiled = jax.jit(functools.partial(chunked_cross_entropy, chunk_size=chunk_size))
    loss, count = compiled(hidden, head, targets, weights)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)


def test_targets_without_weight_are_ignored():
    hidden, head, targets, weights = problem()
    wanted = in_numpy(hidden, head, targets, weights)[0]
    assert (weights == 0).sum() > 3
    spoilt = jnp.where(weights == 0, -100, targets)
    loss, gradients = loss_and_gradients(hidden, head, spoilt, weights, 5)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert (gradients[0][weights == 0] == 0).all()
    nothing, count = chunked_cross_entropy(hidden, head, targets, 0.0 * weights, chunk_size=5)
    assert (float(nothing), float(count)) == (0.0, 0.0)


def test_large_logits_stay_finite():
    hidden, head, targets, weights = problem()
    loss, gradients = loss_and_gradients(1e3 * hidden, head, targets, weights, 7)
    np.testing.assert_allclose(loss, in_numpy(1e3 * hidden, head, targets, weights)[0], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_tied_head_gathers_both_gradients():
    """With full fine-tuning the table is used at the input and transposed at the output."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((50, 8)), jnp.float32)
    tokens, targets = jnp.asarray(rng.integers(0, 50, (2, 24)), jnp.int32)
    weights = jnp.ones(24)

    def tied(loss, table):
        return loss(jnp.tanh(table[tokens]), table.T, targets, weights)

    chunked = lambda *a: chunked_cross_entropy(*a, chunk_size=8)[0]  # noqa: E731
    found = jax.jit(jax.grad(functools.partial(tied, chunked)))(table)
    wanted = jax.jit(jax.grad(functools.partial(tied, dense)))(table)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def adapted_head(head, rank=3, seed=1, dropout_key=None, dropout=0.0):
    rng = np.random.default_rng(seed)
    trainable = {
        "a": jnp.asarray(rng.standard_normal((head.shape[0], rank)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((rank, head.shape[1])), jnp.float32),
    }
    method = LoRA(rank=rank, alpha=2.0, dropout=dropout)

    def bind(trainable):
        arrays = method.prepare(trainable, {})
        return AdaptedKernel(base=head, arrays=arrays, dropout_key=dropout_key, method=method)

    return trainable, bind, method


@pytest.mark.parametrize("chunk_size", [5, 8, 24])
def test_adapted_head_agrees_with_its_merged_form(chunk_size):
    hidden, head, targets, weights = problem()
    trainable, bind, method = adapted_head(head)

    def through_adapter(hidden, trainable):
        return chunked_cross_entropy(
            hidden, bind(trainable), targets, weights, chunk_size=chunk_size
        )[0]

    def through_merged(hidden, trainable):
        merged = method.merge(head, method.prepare(trainable, {}))
        return dense(hidden, merged, targets, weights)

    found = jax.jit(jax.value_and_grad(through_adapter, argnums=(0, 1)))(hidden, trainable)
    wanted = jax.jit(jax.value_and_grad(through_merged, argnums=(0, 1)))(hidden, trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_chunks_have_different_dropout_masks():
    """Equal tokens in different chunks have different masks, the same in both passes."""
    _, head, _, _ = problem()
    hidden, targets = jnp.ones((24, 8)), jnp.zeros(24, jnp.int32)
    trainable, bind, _ = adapted_head(head, dropout=0.5, dropout_key=jax.random.key(3))

    def losses(weights):
        return chunked_cross_entropy(hidden, bind(trainable), targets, weights, chunk_size=8)[0]

    weights = jnp.ones(24)
    evaluated = losses(weights)
    differentiated, by_token = jax.value_and_grad(losses)(weights)
    np.testing.assert_allclose(evaluated, differentiated, rtol=1e-6)
    by_chunk = np.asarray(by_token).reshape(8, 3).T
    assert not any(np.allclose(by_chunk[0], other) for other in by_chunk[1:])


def test_bfloat16_states_and_head_agree():
    hidden, head, targets, weights = problem(tokens=64, embed=32)
    hidden, head = hidden.astype(jnp.bfloat16), (0.3 * head).astype(jnp.bfloat16)
    loss, (of_hidden, of_head, _) = loss_and_gradients(hidden, head, targets, weights, 16)
    wanted = in_numpy(hidden, head, targets, weights)  # of the rounded values, in float64
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    assert (of_hidden.dtype, of_head.dtype) == (jnp.bfloat16, jnp.bfloat16)
    for found, expected in ((of_hidden, wanted[1]), (of_head, wanted[2])):
        error = np.linalg.norm(np.asarray(found, np.float64) - expected)
        assert error < 0.01 * np.linalg.norm(expected)


def test_bfloat16_states_and_float32_head_agree():
    hidden, head, targets, weights = problem()
    _, (of_hidden, of_head, _) = loss_and_gradients(
        hidden.astype(jnp.bfloat16), head, targets, weights, 8
    )
    assert (of_hidden.dtype, of_head.dtype) == (jnp.bfloat16, jnp.float32)


def equations(jaxpr):
    """Yields all equations of a jaxpr and of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


TOKENS, EMBED, VOCAB, CHUNK = 256, 16, 512, 32


def big():
    return problem(tokens=TOKENS, embed=EMBED, vocab=VOCAB)


def chunked_of_hidden(hidden, head, targets, weights):
    return chunked_cross_entropy(hidden, head, targets, weights, chunk_size=CHUNK)[0]


@pytest.mark.parametrize("argnums", [(0,), (0, 1)], ids=["frozen head", "trained head"])
def test_logits_of_all_tokens_are_never_computed_at_once(argnums):
    gradient = jax.grad(chunked_of_hidden, argnums=argnums)
    sizes = [
        outvar.aval.size
        for equation in equations(jax.make_jaxpr(gradient)(*big()).jaxpr)
        for outvar in equation.outvars
    ]
    assert max(sizes) == CHUNK * VOCAB
    chunked = jax.jit(gradient).lower(*big()).compile().memory_analysis()
    all_at_once = jax.jit(jax.grad(dense, argnums=argnums)).lower(*big()).compile()
    logits_bytes = TOKENS * VOCAB * 4
    assert all_at_once.memory_analysis().temp_size_in_bytes >= logits_bytes
    assert chunked.temp_size_in_bytes < 0.5 * logits_bytes


def products(function, *arguments):
    """Counts matrix products of a chunk's size in a compiled program."""
    return sum(
        equation.primitive.name == "dot_general"
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    )


def test_only_needed_products_are_computed():
    """Evaluation takes one product, a frozen head two, and a trainable head three."""
    assert products(chunked_of_hidden, *big()) == 1
    assert products(jax.grad(chunked_of_hidden), *big()) == 2
    assert products(jax.grad(chunked_of_hidden, argnums=(0, 1)), *big()) == 3


def test_frozen_base_under_an_adapter_has_no_gradient():
    """Only arrays of the adapter's size are summed over chunks."""
    hidden, head, targets, weights = big()
    trainable, bind, _ = adapted_head(head)

    def loss(trainable):
        return chunked_of_hidden(hidden, bind(trainable), targets, weights)

    def shapes(of: str | None = None) -> set[tuple[int, ...]]:
        return {
            outvar.aval.shape
            for equation in equations(jax.make_jaxpr(lambda t: jax.grad(loss)(t))(trainable).jaxpr)
            if of in (None, equation.primitive.name)
            for outvar in equation.outvars
        }

    # A B may be added to the head of a chunk, but nothing of that size leaves it.
    assert (EMBED, VOCAB) not in shapes("scan")
    assert (3, VOCAB) in shapes("scan")
    with use_implementation("xla"):  # adds terms to the logits
        assert (EMBED, VOCAB) not in shapes()


def test_gradients_agree_under_scan_and_remat():
    """The loss is rematerialized and summed over microbatches in a scan."""
    hidden, head, targets, weights = problem()
    batches = tuple(x.reshape(4, 6, *x.shape[1:]) for x in (hidden, targets, weights))

    @jax.checkpoint
    def one(head, batch):
        h, t, w = batch
        return chunked_cross_entropy(jnp.tanh(h), head, t, w, chunk_size=2)[0]

    def total(head):
        return jax.lax.scan(lambda sum_, batch: (sum_ + one(head, batch), None), 0.0, batches)[0]

    loss, gradient = jax.jit(jax.value_and_grad(total))(head)
    wanted = in_numpy(np.tanh(hidden), head, targets, weights)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted[2], rtol=1e-4, atol=1e-5)


def test_sharded_loss_needs_no_gather_of_tokens_or_vocabulary():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arguments = big()
    gradient = jax.jit(jax.value_and_grad(chunked_of_hidden, argnums=(0, 1)))
    wanted = gradient(*arguments)
    specs = (P("data"), P(None, "tensor"), P("data"), P("data"))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    found = gradient(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    text = gradient.lower(*placed).compile().as_text()
    assert f"f32[{CHUNK // 4},{VOCAB // 2}]" in text  # a device's share of a chunk's logits
    for whole in (f"f32[{CHUNK},{VOCAB}]", f"f32[{CHUNK},{VOCAB // 2}]", f"f32[{TOKENS},{EMBED}]"):
        assert whole not in text


@pytest.mark.parametrize("argnums", [(0,), (0, 1)], ids=["frozen head", "trained head"])
def test_a_sharded_head_is_gathered_once_for_all_chunks(argnums):
    """The head's rows are sharded along "fsdp", and its columns along "tensor"."""
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))
    arguments = big()
    gradient = jax.value_and_grad(chunked_of_hidden, argnums=argnums)
    wanted = jax.jit(gradient)(*arguments)
    specs = (P("fsdp"), P("fsdp", "tensor"), P("fsdp"), P("fsdp"))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    with on_mesh(mesh):
        compiled = jax.jit(gradient).lower(*placed).compile()
    found = compiled(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    network = network_of([object()] * 8, "cpu", 1, 1)
    program = read_program(compiled.as_text())
    timeline = estimate_program(program, chip=None, network=network)
    columns = EMBED * VOCAB // 2 * 4
    gathers = [one for one in timeline.collectives if one.kind == "all-gather"]
    assert [(one.bytes, one.times) for one in gathers] == [(3 / 4 * columns, 1)]


@pytest.mark.parametrize(("tokens", "chunk_size"), [(24, 7), (23, 5), (24, 100)])
def test_token_scores_agree_with_numpy(tokens, chunk_size):
    hidden, head, targets, weights = problem(tokens=tokens)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    best = logits.argmax(-1)
    targets = jnp.where(jnp.arange(tokens) % 2 == 1, jnp.asarray(best, jnp.int32), targets)
    losses = in_numpy(hidden, head, targets, weights)[3]
    score = jax.jit(chunked_token_scores, static_argnames="chunk_size")
    scores, right = score(hidden, head, targets, chunk_size=chunk_size)
    np.testing.assert_allclose(scores, -losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(right, targets == best)
    assert right.sum() >= tokens // 2


def test_chunk_size_of_zero_is_rejected():
    hidden, head, targets, weights = problem()
    with pytest.raises(ValueError, match=r"chunk_size .* 0"):
        chunked_cross_entropy(hidden, head, targets, weights, chunk_size=0)
