"""Linen modules of users: adapted, merged and called by their own unchanged code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.adapters import METHODS
from peft_jax.flax_models import KernelUseError
from tests.flax_models.user_modules import (
    CNN,
    Encoder,
    EncoderBlock,
    Mixed,
    ReadsKernel,
    ScannedEncoder,
    moved,
)

TOKENS = jnp.array([[1, 2, 3, 4, 5], [12, 0, 7, 7, 1]])
SETTINGS = {
    "boft": {"block_size": 2, "n_butterfly_factors": 2},
    "oft": {"block_size": 4},
    "hybrid": {"block_size": 2, "n_butterfly_factors": 1, "rank": 2},
    "unitary": {},
    "ia3": {},
    "lokr": {"rank": 1},
    "fourierft": {"n_frequency": 3},
}
ADAPTING = [
    name
    for name, method in METHODS.items()
    if issubclass(method, pj.AdapterMethod)
    and not (method.maps_tokens or method.corrects_quantization)
]


def close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), one, other)


@pytest.fixture(autouse=True)
def precise():
    # Code of users promotes dtypes, as Flax's own pooling does.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def encoder():
    module = Encoder(depth=1)
    return module, module.init(jax.random.key(0), TOKENS)


def start(spec, params, model, *args):
    """Returns an adapter that differs from its start; some methods start from a loss."""

    def loss(bound, batch):
        return jnp.mean(jnp.square(model(bound, batch)))

    return moved(spec.init(jax.random.key(1), params, loss_fn=loss, batches=args))


QUICK = ("lora", "lora_ga", "dora", "boft", "hybrid")


@pytest.mark.fast("hybrid")
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ADAPTING],
)
def test_every_method_computes_what_the_merged_module_does(name, encoder):
    module, variables = encoder
    spec = pj.AdapterSpec(METHODS[name](**SETTINGS.get(name, {"rank": 2})))
    model, params = pj.adapt(module, spec, variables, TOKENS)
    state = start(spec, params, model, TOKENS)
    adapted = jax.jit(lambda p, s: model(spec.bind(p, s), TOKENS))(params, state)
    merged = model.to_flax(jax.jit(spec.merge)(params, state))
    found, base = module.apply(merged, TOKENS), module.apply(variables, TOKENS)
    scale = float(jnp.abs(found).max())
    close(adapted / scale, found / scale)
    assert float(jnp.abs(found - base).max()) > 1e-3
    assert len(spec.targets(params).adapted) == 6


def test_at_the_start_nothing_changes_and_no_matrix_is_copied(encoder):
    module, variables = encoder
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    model, params = pj.adapt(module, spec, variables, TOKENS)
    state = spec.init(jax.random.key(1), params)
    close(model(spec.bind(params, state), TOKENS), module.apply(variables, TOKENS))
    jax.tree.map(np.testing.assert_array_equal, model.to_flax(params), variables)
    own = variables["params"]["encoderblock_0"]["Dense_0"]["kernel"]
    assert params["encoderblock_0"]["Dense_0"]["kernel"] is own


def test_gradients_are_those_through_the_merged_kernels(encoder):
    module, variables = encoder
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=r".*(Dense_\d|query|out|embedding)")
    model, params = pj.adapt(module, spec, variables, TOKENS)
    state = moved(spec.init(jax.random.key(1), params))

    def loss(logits):
        return jnp.mean(jnp.sin(logits))

    def adapted(trainable):
        return loss(model(spec.bind(params, state.replace(trainable=trainable)), TOKENS))

    def through_merged(trainable):
        merged = spec.merge(params, state.replace(trainable=trainable))
        return loss(module.apply(model.to_flax(merged), TOKENS))

    own = jax.jit(jax.grad(adapted))(state.trainable)
    other = jax.jit(jax.grad(through_merged))(state.trainable)
    close(own, other, atol=1e-6)
    assert all(float(jnp.abs(leaf).max()) > 1e-5 for leaf in jax.tree.leaves(own))


@pytest.mark.slow
@pytest.mark.parametrize("method", [pj.LoRA(rank=2), pj.HRA(rank=2)], ids=lambda m: m.name)
def test_scanned_and_mapped_layers_have_an_adapter_each(method):
    module, x = ScannedEncoder(), jax.random.normal(jax.random.key(3), (2, 5, 8))
    variables = module.init(jax.random.key(0), x)
    spec = pj.AdapterSpec(method)
    model, params = pj.adapt(module, spec, variables, x)
    state = moved(spec.init(jax.random.key(1), params))
    merged = model.to_flax(spec.merge(params, state))
    adapted = jax.jit(lambda p, s: model(spec.bind(p, s), x))(params, state)
    close(adapted, jax.jit(module.apply)(merged, x))
    assert params["layers.block"]["Dense_0"]["kernel"].shape == (3, 8, 24)
    assert params["heads"]["kernel"].shape == (2, 8, 5)
    row = pj.trainable_table(spec, params, state).split("layers.block.Dense_0")[1]
    assert row.split("\n")[0].strip().startswith("3 x [8, 24]")


def test_each_scanned_layer_is_adapted_by_its_own_arrays():
    """The scanned module equals its blocks called in turn, each with its slice of the adapter."""
    module, x = ScannedEncoder(), jax.random.normal(jax.random.key(3), (2, 5, 8))
    variables = module.init(jax.random.key(0), x)
    spec = pj.AdapterSpec(pj.LoRA(rank=2), exclude_modules=("heads",))
    model, params = pj.adapt(module, spec, variables, x)
    state = moved(spec.init(jax.random.key(1), params))
    y = x
    for layer in range(3):
        own = jax.tree.map(lambda a, at=layer: a[at], variables["params"]["layers"]["block"])
        block, block_params = pj.adapt(EncoderBlock(), None, {"params": own}, x)
        arrays = jax.tree.map(lambda a, at=layer: a[at], state.trainable["layers.block"])
        bound = pj.AdapterSpec(pj.LoRA(rank=2)).bind(block_params, state.replace(trainable=arrays))
        y = block(bound, y)
    heads = variables["params"]["heads"]
    y = jnp.einsum("btd,hdk->hbtk", y, heads["kernel"]) + heads["bias"][:, None, None]
    close(model(spec.bind(params, state), x), y)


class ScannedDense(nn.Module):
    """Three square kernels [3, 3] scanned along their second axis: [3, 3, 3]."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(3, use_bias=False, name="dense")(x), None

        scanned = nn.scan(Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return scanned(name="steps")(x, None)[0]


@pytest.mark.parametrize(
    ("module", "features"), [(ScannedEncoder(axis=1), 8), (ScannedDense(), 3)], ids=["8", "3"]
)
def test_layers_stacked_along_another_axis_are_refused(module, features):
    """Also where the axes have one size, so that shapes do not tell them apart."""
    x = jnp.ones((2, 5, features))
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="stacked along another axis than the first"):
        pj.adapt(module, pj.AdapterSpec(pj.LoRA(rank=3)), variables, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pj.LoRA(rank=2), pytest.param(pj.HRA(rank=2), marks=pytest.mark.slow)],
    ids=lambda m: m.name,
)
def test_a_convolutional_network_with_batch_norm(method):
    module, x = CNN(), jax.random.normal(jax.random.key(3), (2, 12, 11, 3))
    variables = module.init(jax.random.key(0), x)
    spec = pj.AdapterSpec(method)
    model, params = pj.adapt(module, spec, variables, x)
    assert params["Conv_1"]["kernel"].shape == (3 * 2 * 6, 4)
    state = moved(spec.init(jax.random.key(1), params))
    merged = model.to_flax(spec.merge(params, state))
    adapted = model(spec.bind(params, state), x, train=True, mutable=["batch_stats"])
    close(adapted, module.apply(merged, x, train=True, mutable=["batch_stats"]))
    changed = adapted[1]
    again = model(spec.bind(params, state), x, collections=changed)
    close(again, module.apply({**merged, **changed}, x))


@pytest.mark.slow
def test_dropout_has_a_mask_for_each_key():
    module, x = ScannedEncoder(), jax.random.normal(jax.random.key(3), (2, 5, 8))
    spec = pj.AdapterSpec(pj.LoRA(rank=2, dropout=0.5))
    model, params = pj.adapt(module, spec, module.init(jax.random.key(0), x), x)
    state = moved(spec.init(jax.random.key(1), params))

    @jax.jit
    def call(key):
        return model(spec.bind(params, state, dropout_key=key), x)

    one, other = call(jax.random.key(0)), call(jax.random.key(1))
    np.testing.assert_array_equal(one, call(jax.random.key(0)))
    assert float(jnp.abs(one - other).max()) > 1e-3
    assert float(jnp.abs(one - model(spec.bind(params, state), x)).max()) > 1e-3


def test_computation_in_bfloat16_stays_near():
    module, x = nn.Dense(6, dtype=jnp.bfloat16), jnp.ones((2, 4))
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    model, params = pj.adapt(module, spec, module.init(jax.random.key(0), x), x)
    state = moved(spec.init(jax.random.key(1), params))
    found = model(spec.bind(params, state), x)
    assert found.dtype == jnp.bfloat16
    merged = module.apply(model.to_flax(spec.merge(params, state)), x)
    np.testing.assert_allclose(found.astype("float32"), merged.astype("float32"), atol=0.03)


def test_subclasses_of_layers_are_adapted_where_the_layer_multiplies():
    class Shifted(nn.Dense):
        def __call__(self, x):
            return super().__call__(x) + 1.0

    module, x = Shifted(3), jnp.ones((2, 4))
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=r".*")
    model, params = pj.adapt(module, spec, module.init(jax.random.key(0), x), x)
    state = moved(spec.init(jax.random.key(1), params))
    merged = model.to_flax(spec.merge(params, state))
    close(model(spec.bind(params, state), x), module.apply(merged, x))


@pytest.mark.parametrize("target_modules", ["all-linear", ("project",)])
def test_a_kernel_that_no_layer_of_flax_multiplies_by_is_named(target_modules):
    module, x = Mixed(), jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=target_modules)
    wrong = r"project cannot be adapted: OwnProduct uses its kernel in code of its own"
    with pytest.raises(KernelUseError, match=wrong):
        pj.adapt(module, spec, variables, x)
    model, params = pj.adapt(module, None, variables, x)
    with pytest.raises(KernelUseError, match=wrong):
        model(spec.bind(params, spec.init(jax.random.key(1), params)), x)
    pj.adapt(module, pj.AdapterSpec(pj.LoRA(rank=2), exclude_modules=("project",)), variables, x)


def test_a_second_use_of_an_adapted_kernel_is_named():
    module, x = ReadsKernel(), jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(KernelUseError, match="twice is adapted, but its kernel is used by code"):
        pj.adapt(module, pj.AdapterSpec(pj.LoRA(rank=2)), variables, x)


def test_targets_that_match_nothing_are_named_with_near_names(encoder):
    module, variables = encoder
    spec = pj.AdapterSpec(pj.LoRA(rank=2), target_modules=("qery",))
    with pytest.raises(ValueError, match=r"'qery', which matches no module; did you mean 'query'"):
        pj.adapt(module, spec, variables, TOKENS)


def test_embeddings_take_low_rank_methods_only(encoder):
    module, variables = encoder
    spec = pj.AdapterSpec(pj.HRA(rank=2), target_modules=("shared_embedding",))
    with pytest.raises(KernelUseError, match="shared_embedding is an embedding"):
        pj.adapt(module, spec, variables, TOKENS)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="needs its variables and inputs"):
        pj.adapt(nn.Dense(3), pj.AdapterSpec(pj.LoRA()))
    with pytest.raises(ValueError, match='must have "params"'):
        pj.adapt(nn.Dense(3), None, {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4)))
    x = jnp.ones((2, 4))
    model, params = pj.adapt(nn.Dense(3), None, nn.Dense(3).init(jax.random.key(0), x), x)
    spec = pj.AdapterSpec(pj.LoRA(rank=1), target_modules=r".*")
    with pytest.raises(ValueError, match="has an adapter bound; merge it first"):
        model.to_flax(spec.bind(params, spec.init(jax.random.key(1), params)))
