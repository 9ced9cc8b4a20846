"""Tests that a registered method of another package works as the built-in ones."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scaled_method import Scaled

from peft_jax.adapters import METHODS, AdapterMethod, AdapterSpec, LoRA, register_method
from peft_jax.core import dense, flatten
from peft_jax.data import Batch
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.models import build_model
from peft_jax.training import RunConfig, Trainer, default_config, from_config_dict

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}


@pytest.fixture
def scaled():
    register_method(Scaled)
    yield Scaled
    del METHODS[Scaled.name]


def test_registered_method_can_be_configured(scaled):
    config = default_config()
    config.method.name, config.method.strength = "scaled", 2.0
    config.model.path, config.data.path, config.data.recipe = "base", "rows.jsonl", "chat"
    config.train.steps, config.train.batch_size, config.train.max_length = 10, 4, 32
    found = from_config_dict(config)
    assert found.spec.method == Scaled(strength=2.0)
    assert found.train.learning_rate == 3e-3
    assert RunConfig.from_mapping(found.to_mapping()) == found


def test_registered_method_trains_saves_loads_and_merges(scaled, tmp_path):
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    spec = AdapterSpec(Scaled(strength=2.0), target_modules=("up_proj", "q_proj"))
    rows = np.arange(8 * 12).reshape(8, 12) % 32
    losses = []
    trainer = Trainer(model, spec, optax.adam(1e-2))
    training = trainer.initialize(params)
    for _ in range(5):
        losses.append(float(trainer.step(training, Batch.from_tokens(rows))["loss"]))
    assert losses[-1] < losses[0]
    save_adapter(tmp_path / "mine", model, spec, training.adapter, "someone/base")
    loaded, state = load_adapter(tmp_path / "mine", model, params)
    assert loaded == spec
    for path, leaf in flatten(training.adapter.trainable).items():
        np.testing.assert_array_equal(flatten(state.trainable)[path], leaf)
    tokens = jnp.asarray(rows)
    bound, merged = loaded.bind(params, state), loaded.merge(params, state)
    np.testing.assert_allclose(model(bound, tokens), model(merged, tokens), atol=1e-5)
    assert float(jnp.abs(model(bound, tokens) - model(params, tokens)).max()) > 1e-3


def test_duplicate_method_name_is_rejected(scaled):
    assert register_method(Scaled) is Scaled
    other = dataclasses.make_dataclass("Other", [], bases=(Scaled,), frozen=True)
    with pytest.raises(ValueError, match=r"Other .*'scaled'.* Scaled"):
        register_method(other)


@pytest.mark.parametrize("missing", ["name", "learning_rate"])
def test_method_without_a_required_class_variable_is_rejected(missing):
    kept = {"name": "bare", "learning_rate": 1.0}
    del kept[missing]
    bare = dataclasses.dataclass(frozen=True)(type("Bare", (AdapterMethod,), kept))
    with pytest.raises(ValueError, match=f"Bare .*'{missing}'"):
        register_method(bare)


def test_entry_point_is_loaded(monkeypatch):
    class Entry:
        def load(self):
            return Scaled

    found = {"peft_jax.methods": [Entry()]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: found.get(group, []))
    from peft_jax.adapters import registry

    registry.register_installed()
    assert METHODS.pop("scaled") is Scaled


def test_every_method_declares_its_properties():
    assert all(method.learning_rate > 0 for method in METHODS.values())
    assert {name for name, method in METHODS.items() if method.branches} == {"hybrid"}
    assert {name for name, method in METHODS.items() if method.trains_base} == {"full"}
    assert not LoRA().has_dropout
    assert LoRA(dropout=0.1).has_dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromNorms(Scaled):
    """Scales a kernel's columns of norm 1 by trainable norms, which start at the kernel's own."""

    name: ClassVar[str] = "from_norms"
    uses_kernel: ClassVar[bool] = True

    def init(self, key, shape, gradient=None, *, kernel):
        assert kernel.shape == shape
        norms = jnp.linalg.norm(kernel, axis=0)
        return {"s": norms}, {"start": norms}

    def axes(self, d_in, d_out):
        return {"s": (d_out,)}, {"start": (d_out,)}

    def prepare(self, trainable, constant, *, dropout_key=None):
        return {"scale": trainable["s"] / constant["start"]}


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_start_from_the_kernel(quantization):
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0), quantization=quantization)
    spec = AdapterSpec(FromNorms(), target_modules=("up_proj", "q_proj"))
    state = spec.init(jax.random.key(1), params)
    for path, norms in flatten(state.constant).items():
        kernel = dense(flatten(params)[path[:-1]])
        np.testing.assert_allclose(norms, jnp.linalg.norm(kernel, axis=-2), rtol=1e-5)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), spec.abstract(params))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(
        model(spec.bind(params, state), tokens), model(params, tokens), atol=1e-5
    )
