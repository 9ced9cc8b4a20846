"""NNX modules of users: adapted, merged and called by their own unchanged code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_jax as pj
from peft_jax.flax_models import Einsum, KernelUseError
from tests.flax_models.user_modules import NNXOwn, NNXTransformer, OwnEinsum, moved

TOKENS = jnp.array([[1, 2, 3, 4, 5], [12, 0, 7, 7, 1]])


def close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), one, other)


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def transformer():
    module = NNXTransformer(nnx.Rngs(0))
    module.eval()
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "target_modules"),
    [
        (pj.LoRA(rank=2), r".*"),
        (pj.HRA(rank=2), "all-linear"),
        (pj.BOFT(block_size=2, n_butterfly_factors=2), "all-linear"),
        (pj.DoRA(rank=2), ("query", "up", "stack", "mix")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_transformer_computes_what_the_merged_module_does(method, target_modules, transformer):
    spec = pj.AdapterSpec(method, target_modules=target_modules)
    model, params = pj.adapt(transformer, spec, TOKENS)
    state = moved(spec.init(jax.random.key(1), params))
    adapted = jax.jit(lambda p, s: model(spec.bind(p, s), TOKENS))(params, state)
    merged = model.to_flax(spec.merge(params, state))
    found, base = merged(TOKENS), transformer(TOKENS)
    assert float(jnp.abs(found - base).max()) > 1e-2
    close(adapted / jnp.abs(found).max(), found / jnp.abs(found).max())
    assert type(merged.layers[0].up) is nnx.Linear
    close(model.from_flax(merged), spec.merge(params, state), atol=0)


def test_names_are_the_modules_own(transformer):
    spec = pj.AdapterSpec(
        pj.LoRA(rank=2),
        target_modules=r"layers\.1\..*|stack",
        rank_pattern={"layers.1.up": 3},
        modules_to_save=("layers.0.norm",),
    )
    model, params = pj.adapt(transformer, spec, TOKENS)
    names = sorted(".".join(path[:-1]) for path in spec.targets(params).adapted)
    attention = [f"layers.1.attention.{name}" for name in ("key", "out", "query", "value")]
    assert names == [*attention, "layers.1.down", "layers.1.up", "stack"]
    state = spec.init(jax.random.key(0), params)
    assert state.trainable["layers.1"]["up"]["kernel"]["a"].shape == (8, 3)
    assert state.trainable["stack"]["kernel"]["a"].shape == (3, 8, 2)
    assert state.trainable["layers.0"]["norm"]["scale"].shape == (8,)
    with pytest.raises(ValueError, match="layers are not stacked; name"):
        pj.AdapterSpec(pj.LoRA(), layers_to_transform=(0,)).targets(params)
    with pytest.raises(ValueError, match=r"'layers.7.up', which matches no module; known: down"):
        pj.AdapterSpec(pj.LoRA(), target_modules=("layers.7.up",)).targets(params)
    close(model(params, TOKENS), transformer(TOKENS))


def test_gradients_are_those_through_the_merged_kernels(transformer):
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=r".*")
    model, params = pj.adapt(transformer, spec)
    state = moved(spec.init(jax.random.key(1), params))

    def loss(trainable, call):
        return jnp.mean(jnp.sin(call(state.replace(trainable=trainable))))

    own = jax.jit(jax.grad(lambda t: loss(t, lambda s: model(spec.bind(params, s), TOKENS))))
    other = jax.jit(
        jax.grad(lambda t: loss(t, lambda s: model.to_flax(spec.merge(params, s))(TOKENS)))
    )
    close(own(state.trainable), other(state.trainable))


def test_neither_the_users_module_nor_its_state_changes():
    module = NNXTransformer(nnx.Rngs(0))  # Its dropout counts.
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    model, params = pj.adapt(module, spec, TOKENS)
    bound = spec.bind(params, spec.init(jax.random.key(1), params))
    one = jax.jit(model)(bound, TOKENS)
    close(one, jax.jit(model)(bound, TOKENS), atol=0)
    close(one, model(bound, TOKENS))
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert type(module.layers[0].up) is nnx.Linear
    # With a key of one's own for each call.
    own = model.bind(bound)
    nnx.reseed(own, default=7)
    assert float(jnp.abs(own(TOKENS) - one).max()) > 1e-3


def test_einsums_of_ones_own():
    module, x = NNXOwn(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 8))
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=("q", "o"))
    with pytest.raises(ValueError, match="'q', which matches no module"):
        pj.adapt(module, spec, x)
    model, params = pj.adapt(module, spec, x, layers={OwnEinsum: Einsum("w", "equation")})
    assert params["q"]["kernel"].shape == (8, 8)
    state = moved(spec.init(jax.random.key(1), params))
    merged = model.to_flax(spec.merge(params, state))
    close(model(spec.bind(params, state), x), merged(x))
    expected = module.q.w[...] + 8 * jnp.einsum(
        "dr,rk->dk", *(state.trainable["q"]["kernel"][name] for name in "ab")
    ).reshape(8, 2, 4).transpose(1, 0, 2)
    close(merged.q.w[...], expected)


def test_a_second_use_of_an_adapted_kernel_is_named():
    module, x = NNXOwn(nnx.Rngs(0)), jnp.ones((2, 5, 8))
    with pytest.raises(KernelUseError, match="tied is adapted, but its kernel is used by code"):
        pj.adapt(module, pj.AdapterSpec(pj.LoRA(rank=2)), x)


def test_layers_whose_settings_an_adapter_would_leave_out_are_named():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.groups = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)
            self.twice = nnx.Einsum("bii,ij->bj", (4, 4), rngs=rngs)
            self.custom = nnx.Linear(4, 4, dot_general=lambda *a, **k: None, rngs=rngs)

    faults = {
        "groups": "it convolves 2 groups",
        "twice": "a letter is twice in one operand",
        "custom": "its dot_general is set",
    }
    for name, why in faults.items():
        spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=(name,))
        with pytest.raises(KernelUseError, match=f"{name} cannot be adapted: .*{why}"):
            pj.adapt(Net(nnx.Rngs(0)), spec)


def test_stacks_along_another_axis_are_named():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(out_axes=nnx.StateAxes({nnx.Param: 1, ...: 0}))
    def stack(rngs):
        return nnx.Linear(4, 5, use_bias=False, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self):
            self.stack = stack(nnx.Rngs(0))

    with pytest.raises(KernelUseError, match="stacked along another axis than the first"):
        pj.adapt(Net(), pj.AdapterSpec(pj.LoRA(rank=2), target_modules=("stack",)))


def test_something_else_than_a_module_is_refused():
    with pytest.raises(ValueError, match="must be a Linen or an NNX module"):
        pj.adapt.__wrapped__(object(), None)
