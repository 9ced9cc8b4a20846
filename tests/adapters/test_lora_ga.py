"""Tests LoRA-GA's initialization against Hugging Face PEFT and against the paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, GradientFactors, LoRAGA
from peft_jax.core import linear

D_IN, D_OUT, RANK = 10, 12, 3
DIRECTIONS = {
    "ArB2r": ([0, 1, 2], [3, 4, 5]),
    "A2rBr": ([3, 4, 5], [0, 1, 2]),
    "ArBr": ([1, 3, 5], [0, 2, 4]),
}


@pytest.fixture(scope="module")
def gradient() -> np.ndarray:
    """Returns a random gradient [D_IN, D_OUT]."""
    return np.random.default_rng(0).normal(size=(D_IN, D_OUT))


@pytest.fixture(scope="module")
def factors(gradient) -> GradientFactors:
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    k = 2 * RANK
    return GradientFactors(*(jnp.asarray(a, jnp.float32) for a in (u[:, :k], s[:k], vt[:k].T)))


def same_up_to_signs(found, expected) -> np.ndarray:
    """Asserts that rows agree up to their signs, and returns the signs."""
    signs = np.sign(np.sum(np.asarray(found) * expected, axis=1, keepdims=True))
    np.testing.assert_allclose(found * signs, expected, atol=2e-5)
    return signs


@pytest.mark.parametrize("init_scale", ["stable", "gd", "unit"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peft_convention_agrees_with_peft(direction, init_scale, gradient, factors, key):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    module = torch.nn.Sequential(torch.nn.Linear(D_IN, D_OUT, bias=False))
    before = module[0].weight.detach().clone()
    # Sets what peft.preprocess_loraga sets; torch weights are [out, in].
    module[0]._peft_loraga_grad = torch.tensor(gradient.T, dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=5,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(
            direction=direction,
            scale={"gd": "gd_scale"}.get(init_scale, init_scale),
            stable_gamma=9,
        ),
    )
    layer = peft.get_peft_model(module, config).base_model.model[0]
    a, b = (
        getattr(layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B")
    )

    method = LoRAGA(
        rank=RANK,
        alpha=5.0,
        rank_stabilized=False,
        direction=direction,
        init_scale=init_scale,
        gamma=9.0,
        convention="peft",
    )
    ours, constant = method.init(key, (D_IN, D_OUT), factors)
    signs = same_up_to_signs(np.asarray(ours["a"]).T, a) * same_up_to_signs(ours["b"], b.T)
    # PEFT subtracts the initial product from its base weight.
    expected = (before - layer.base_layer.weight.detach()).numpy().T
    subtracted = method.scale * constant["a0"] @ (signs * constant["b0"])
    np.testing.assert_allclose(subtracted, expected, atol=5e-5)


@pytest.mark.parametrize("init_scale", ["stable", "gd", "unit"])
@pytest.mark.parametrize("direction", [*DIRECTIONS, "random"])
def test_authors_convention_agrees_with_the_paper(direction, init_scale, factors, key):
    method = LoRAGA(rank=RANK, alpha=5.0, direction=direction, init_scale=init_scale, gamma=9.0)
    trainable, constant = method.init(key, (D_IN, D_OUT), factors)
    factor = {
        "stable": D_OUT**0.25 / math.sqrt(9.0),
        "gd": math.sqrt(RANK) / 5.0,
        "unit": 1.0,
    }[init_scale]
    u, v = np.asarray(factors.u), np.asarray(factors.v)
    if direction == "random":
        for_a = for_b = [
            int(np.argmax(np.abs(u.T @ column))) for column in np.asarray(trainable["a"]).T
        ]
        assert len(set(for_a)) == RANK
        others = LoRAGA(rank=RANK, direction=direction).init(
            jax.random.fold_in(key, 5), (D_IN, D_OUT), factors
        )[0]
        assert not np.allclose(
            others["a"] / others["a"].max(), trainable["a"] / trainable["a"].max()
        )
    else:
        for_a, for_b = DIRECTIONS[direction]
    np.testing.assert_allclose(trainable["a"], factor * u[:, for_a], rtol=1e-6)
    np.testing.assert_allclose(trainable["b"], factor * v[:, for_b].T, rtol=1e-6)
    np.testing.assert_array_equal(trainable["a"], constant["a0"])
    np.testing.assert_array_equal(trainable["b"], constant["b0"])


def test_first_step_moves_the_kernel_along_the_negative_gradient(key):
    kernel = jax.random.normal(key, (20, 16)) / 5
    # Gives the gradient a few dominant directions, as a few tokens do.
    x = jax.random.normal(jax.random.fold_in(key, 1), (64, 20)) @ jnp.diag(0.5 ** jnp.arange(20.0))
    y = jax.random.normal(jax.random.fold_in(key, 2), (64, 16))

    def loss(params, batch):
        x, y = batch
        return jnp.mean((linear(x, params["proj"]["kernel"]) - y) ** 2)

    params = {"proj": {"kernel": kernel}}
    spec = AdapterSpec(method=LoRAGA(rank=4))
    state = spec.init(key, params, loss_fn=loss, batches=[(x, y)])
    gradient = jax.grad(loss)(params, (x, y))["proj"]["kernel"]
    step = jax.grad(lambda t: loss(spec.bind(params, state.replace(trainable=t)), (x, y)))(
        state.trainable
    )
    moved = jax.tree.map(lambda leaf, g: leaf - 1e-3 * g, state.trainable, step)
    change = spec.merge(params, state.replace(trainable=moved))["proj"]["kernel"] - kernel
    cosine = -jnp.sum(change * gradient) / jnp.linalg.norm(change) / jnp.linalg.norm(gradient)
    assert float(cosine) > 0.95


def test_initialization_without_a_gradient_is_rejected(key):
    params = {"proj": {"kernel": jnp.ones((16, 16))}}
    with pytest.raises(ValueError, match=r"lora_ga .*gradient"):
        AdapterSpec(method=LoRAGA(rank=2)).init(key, params)
    with pytest.raises(ValueError, match=r"gradient .*lora_ga"):
        LoRAGA(rank=2).init(key, (16, 16))


def test_too_high_rank_is_rejected_with_the_maximum():
    params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 16, 6))}}}
    with pytest.raises(ValueError, match=r"rank .*4.* layers\.q_proj \[16, 6\] .* 3;"):
        AdapterSpec(method=LoRAGA(rank=4)).targets(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "ArB3r"}, r"direction .*'ArB3r'.*'ArB2r'"),
        ({"init_scale": "weightS"}, r"init_scale .*'weightS'"),
        ({"convention": "theirs"}, r"convention .*'theirs'.*authors, peft"),
        ({"gamma": 0.0}, r"gamma .*0\.0"),
        ({"rank": 0}, r"rank .* 0"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAGA(**settings)
