"""Tests the allocation of AdaLoRA's ranks against Hugging Face PEFT's allocator on torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.optim import rank_allocation

D_IN, D_OUT, RANK, LAYERS, RATE = 6, 5, 4, 2, 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        {"initial_steps": 2, "final_steps": 3, "every": 1},
        {"initial_steps": 0, "final_steps": 4, "every": 2},
    ],
)
def test_allocation_agrees_with_peft(schedule):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    steps = 10
    module = torch.nn.Sequential(*(torch.nn.Linear(D_IN, D_OUT) for _ in range(LAYERS)))
    config = peft.AdaLoraConfig(
        target_modules=[str(layer) for layer in range(LAYERS)],
        init_r=RANK,
        target_r=2,
        total_step=steps,
        tinit=schedule["initial_steps"],
        tfinal=schedule["final_steps"],
        deltaT=schedule["every"],
    )
    theirs = peft.get_peft_model(module, config)
    rng = np.random.default_rng(0)
    shapes = {"a": (D_IN, RANK), "b": (RANK, D_OUT), "e": (RANK,)}
    ours = {n: jnp.asarray(rng.normal(size=(LAYERS, *s)), jnp.float32) for n, s in shapes.items()}
    layers = [theirs.base_model.model[layer] for layer in range(LAYERS)]
    names = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}

    def there(layer, name):
        return getattr(layers[layer], names[name])["default"]

    def to_torch(name, values):
        values = np.asarray(values)
        return torch.tensor(values[:, None] if name == "e" else values.T.copy())

    with torch.no_grad():
        for name, values in ours.items():
            for layer in range(LAYERS):
                there(layer, name).copy_(to_torch(name, values[layer]))
    optimizer = rank_allocation(optax.sgd(RATE), total_steps=steps, target_rank=2, **schedule)
    tree = {"layers": {"q_proj": {"kernel": ours}}, "norm": jnp.ones(3)}
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    allocator = theirs.base_model.rankallocator
    counts = []
    for step in range(steps):
        gradients = {
            n: jnp.asarray(rng.normal(size=(LAYERS, *s)), jnp.float32) for n, s in shapes.items()
        }
        updates, state = update(
            {"layers": {"q_proj": {"kernel": gradients}}, "norm": jnp.ones(3)}, state, tree
        )
        tree = optax.apply_updates(tree, updates)
        with torch.no_grad():
            for name, values in gradients.items():
                for layer in range(LAYERS):
                    parameter = there(layer, name)
                    parameter.grad = to_torch(name, values[layer])
                    parameter.sub_(RATE * parameter.grad)
        final = step >= steps - schedule["final_steps"]
        allocator.update_and_allocate(theirs.base_model.model, step, force_mask=final)
        found = tree["layers"]["q_proj"]["kernel"]
        for name in shapes:
            for layer in range(LAYERS):
                np.testing.assert_allclose(
                    to_torch(name, found[name][layer]),
                    there(layer, name).detach(),
                    atol=1e-5,
                    err_msg=f"{name} of layer {layer} in step {step}",
                )
        counts.append(int((found["e"] != 0).sum()))
    assert counts[0] == RANK * LAYERS
    assert counts[-1] == 2 * LAYERS
    np.testing.assert_allclose(tree["norm"], 1.0 - RATE * steps, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps .* 0"),
        ({"total_steps": 4, "initial_steps": 2, "final_steps": 2}, r"initial_steps \(2\).*\(4\)"),
        ({"total_steps": 4, "beta1": 1.0}, r"beta1 .*1\.0"),
        ({"total_steps": 4, "target_rank": 0}, "target_rank .* 0"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        rank_allocation(optax.sgd(0.1), **settings)
