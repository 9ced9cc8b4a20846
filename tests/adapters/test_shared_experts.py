"""One adapter of all experts: each expert's kernel is adapted by the same arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_mixtral import MIXTRAL, moved

from peft_jax.adapters import (
    METHODS,
    AdapterSpec,
    Full,
    LoRA,
    VirtualMethod,
    approximate_by_lora,
    trainable_table,
)
from peft_jax.adapters.shared_experts import SharedByExperts
from peft_jax.core import SHARED, flatten, grouped_linear, linear, unflatten
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.models import build_model
from peft_jax.models.model import quantize_params
from peft_jax.optim.matrices import MATRIX, kind_of
from peft_jax.parallel import LogicalAxisRules, MeshSettings, make_mesh, on_mesh, sharding_tree

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
DOWN = ("layers", "mlp", "experts", "down_proj", "kernel")
SETTINGS = {
    "lokr": {"rank": 1},
    "hybrid": {"rank": 2, "block_size": 4},
    "boft": {"block_size": 4},
    "oft": {"block_size": 4},
    "gralora": {"rank": 2},
    "fourierft": {"n_frequency": 20},
    "vera": {"rank": 4},
    "shira": {"rank": 2},
}


def make(name):
    ranked = "rank" in {field.name for field in dataclasses.fields(METHODS[name])}
    return METHODS[name](**SETTINGS.get(name, {"rank": 2} if ranked else {}))


def adapts(name):
    method = METHODS[name]
    return hasattr(method, "project") and not (
        method.maps_tokens or method.uses_kernel or make(name).input_rank
    )


ABLE = [name for name in METHODS if adapts(name) and name not in ("hira", "loftq")]


def square(model, params, tokens):
    return jnp.mean(jnp.square(model(params, tokens)))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Loss for starts from gradients; equal for equal models."""

    model: object

    def __call__(self, params, batch):
        return square(self.model, params, batch)

    def __hash__(self):
        return hash(id(self.model))


@pytest.fixture(scope="module")
def mixtral():
    model = build_model(MIXTRAL)
    return model, model.init_params(jax.random.key(0))


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(1, 61, (8, 8)), jnp.int32)


def started(spec, mixtral, tokens):
    model, params = mixtral
    return spec.init(jax.random.key(1), params, loss_fn=Loss(model), batches=[tokens])


@pytest.mark.fast("lora")
@pytest.mark.parametrize("name", ABLE)
def test_each_expert_is_adapted_by_the_same_arrays(name, mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(make(name), target_modules=EXPERTS, share_experts=True)
    state = started(spec, mixtral, tokens)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), spec.abstract(params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected
    forward = jax.jit(model)
    if not spec.method.steps_at_start:
        found = forward(spec.bind(params, state), tokens)
        np.testing.assert_allclose(found, forward(params, tokens), atol=2e-5)

    state = moved(state)
    kernel = jax.tree.map(lambda x: x[1], flatten(spec.bind(params, state))[DOWN])
    merged = flatten(spec.merge(params, state))[DOWN][1]
    rows = jnp.asarray(np.random.default_rng(2).standard_normal((9, 16)), jnp.float32)
    found = grouped_linear(rows, kernel, jnp.array([2, 0, 4, 3]))
    assert float(jnp.abs(merged - flatten(params)[DOWN][1]).max()) > 1e-4
    for expert, own in ((0, slice(0, 2)), (2, slice(2, 6)), (3, slice(6, 9))):
        one = dataclasses.replace(kernel, base=kernel.base[expert])
        np.testing.assert_allclose(found[own], linear(rows[own], one), atol=2e-5)
        np.testing.assert_allclose(found[own], rows[own] @ merged[expert], atol=2e-5)


def test_gradients_are_the_sums_of_each_experts(mixtral, tokens):
    model, params = mixtral
    shared = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS, share_experts=True)
    own = dataclasses.replace(shared, share_experts=False)
    state = moved(shared.init(jax.random.key(1), params))

    def copied(path, x):
        return (*path[: path.index(SHARED)], path[-1]), jnp.repeat(x[:, None], 4, axis=1)

    copies = unflatten(dict(copied(*item) for item in flatten(state.trainable).items()))

    def gradient(spec, trainable):
        def loss(trainable):
            bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
            return square(model, bound, tokens)

        return flatten(jax.jit(jax.grad(loss))(trainable))

    found, each = gradient(shared, state.trainable), gradient(own, copies)
    for path, value in found.items():
        total = jnp.sum(each[(*path[: path.index(SHARED)], path[-1])], axis=1)
        np.testing.assert_allclose(value, total, atol=1e-5 * float(jnp.abs(total).max()))


@pytest.mark.slow
def test_a_start_is_from_the_sum_of_the_experts_gradients(mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(METHODS["lora_ga"](rank=2), target_modules=EXPERTS, share_experts=True)
    factors = spec.start_factors(
        jax.random.key(1), params, loss_fn=Loss(model), batches=[tokens], passes=8
    )[DOWN]
    gradient = flatten(jax.jit(jax.grad(lambda p: square(model, p, tokens)))(params))[DOWN]
    values = np.linalg.svd(np.asarray(gradient, np.float64).sum(axis=1), compute_uv=False)
    np.testing.assert_allclose(factors.s, values[:, : factors.s.shape[-1]], rtol=1e-3)


@pytest.mark.slow
def test_a_quantized_base_is_adapted_too(mixtral, tokens):
    model, params = mixtral
    params = quantize_params(params, "int8")
    spec = AdapterSpec(make("hybrid"), target_modules=EXPERTS, share_experts=True)
    state = moved(started(spec, (model, params), tokens))
    forward = jax.jit(model)
    found = forward(spec.bind(params, state), tokens)
    np.testing.assert_allclose(found, forward(spec.merge(params, state), tokens), atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "lora"])
def test_a_mesh_computes_what_one_device_does(name, mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(make(name), target_modules=EXPERTS, share_experts=True)
    state = moved(started(spec, mixtral, tokens))

    def loss(trainable, params):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        return square(model, bound, tokens)

    expected = jax.jit(jax.grad(loss))(state.trainable, params)
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, expert=2, tensor=2))
    rules, axes = LogicalAxisRules(), model.logical_axes()
    own = sharding_tree(spec.axes(params, axes).trainable, mesh, rules, state.trainable)
    placed = jax.device_put(state.trainable, own)
    base = jax.device_put(params, sharding_tree(axes, mesh, rules, params))
    with on_mesh(mesh, rules):
        found = jax.jit(jax.grad(loss))(placed, base)
        started_there = started(spec, (model, base), tokens)
    for path, gradient in flatten(expected).items():
        largest = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(
            flatten(found)[path], gradient, atol=2e-5 * largest, err_msg=path
        )
    for path, array in flatten(started(spec, mixtral, tokens).trainable).items():
        np.testing.assert_allclose(
            jnp.abs(flatten(started_there.trainable)[path]), jnp.abs(array), atol=2e-3, err_msg=path
        )


def test_layers_may_differ(mixtral):
    _, params = mixtral
    spec = AdapterSpec(
        LoRA(rank=2),
        target_modules=EXPERTS,
        share_experts=True,
        rank_pattern={"layers.0.mlp.experts.down_proj": 1},
    )
    state = moved(spec.init(jax.random.key(1), params))
    change = flatten(spec.merge(params, state))[DOWN] - flatten(params)[DOWN]
    ranks = [np.linalg.matrix_rank(one, tol=1e-5) for one in np.asarray(change)[:, 0]]
    assert ranks == [1, 2]


def test_saved_adapters_load_and_say_why_not_in_peft(mixtral, tmp_path):
    model, params = mixtral
    spec = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS, share_experts=True)
    state = moved(spec.init(jax.random.key(1), params))
    save_adapter(tmp_path, model, spec, state, "someone/base")
    loaded, again = load_adapter(tmp_path, model, params)
    assert loaded == spec
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again.trainable, state.trainable))
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert "share_experts" in (tmp_path / "peft_jax_adapter.json").read_text()


@pytest.mark.fast("boft")
@pytest.mark.parametrize("name", ["boft", "lora"])
def test_each_expert_gets_the_nearest_lora(name, mixtral):
    _, params = mixtral
    spec = AdapterSpec(make(name), target_modules=EXPERTS[1:], share_experts=True)
    state = moved(spec.init(jax.random.key(1), params))
    found = approximate_by_lora(spec, params, state, rank=16)
    assert not found.spec.share_experts
    merged, expected = (
        flatten(one.merge(params, arrays))[DOWN]
        for one, arrays in ((found.spec, found.state), (spec, state))
    )
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def test_matrices_are_found_and_the_table_names_them(mixtral):
    _, params = mixtral
    spec = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS, share_experts=True)
    state = spec.abstract(params)
    kinds = {kind_of(path, leaf) for path, leaf in flatten(state.trainable).items()}
    assert kinds == {MATRIX}
    assert "lora r=2 shared" in trainable_table(spec, params, state)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"method": METHODS["dora"](), "target_modules": EXPERTS}, "kernel of each"),
        ({"method": METHODS["hira"](), "target_modules": EXPERTS}, "entries"),
        ({"method": METHODS["eva"](), "target_modules": EXPERTS}, "inputs of each"),
        ({"method": LoRA(dropout=0.1), "target_modules": EXPERTS}, "dropout"),
        ({"method": LoRA()}, "selects no experts"),
        ({"method": Full()}, "share_experts must be unset"),
    ],
)
def test_what_cannot_be_shared_is_rejected(spec, named, mixtral):
    _, params = mixtral
    with pytest.raises(ValueError, match=named):
        AdapterSpec(**spec, share_experts=True).targets(params)


def test_every_method_is_shared_or_rejected_by_name(mixtral):
    _, params = mixtral
    for name, method in METHODS.items():
        if name in ABLE or issubclass(method, VirtualMethod):
            continue
        with pytest.raises(ValueError, match=name):
            AdapterSpec(make(name), target_modules=EXPERTS, share_experts=True).targets(params)


def test_a_method_that_reads_its_base_says_that_it_cannot_be_shared(mixtral):
    _, params = mixtral
    method = SharedByExperts(of=METHODS["hira"](rank=2))
    arrays = method.prepare(*method.init(jax.random.key(0), (16, 32)))
    kernels = flatten(params)[DOWN][0]
    with pytest.raises(ValueError, match="reads its base"):
        method.project_groups(jnp.ones((4, 16)), kernels, arrays, jnp.array([1, 1, 1, 1]))


def test_two_kinds_of_adapters_do_not_nest(mixtral):
    _, params = mixtral
    shared = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS, share_experts=True)
    own = dataclasses.replace(shared, share_experts=False)
    bound = own.bind(params, own.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match="adapted twice"):
        shared.bind(bound, shared.init(jax.random.key(0), params))
