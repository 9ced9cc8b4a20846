"""Provides a small pretrained checkpoint, as models of this library and of transformers."""

import pytest

pytest.importorskip("lm_eval", reason="evaluation needs the extra 'eval'")

import jax


@pytest.fixture(scope="session")
def checkpoint(shared_data):
    """Returns a pretrained Llama with 656,000 parameters and a context of 512 tokens."""
    return shared_data / "models" / "tinystories656K"


@pytest.fixture(scope="session")
def mesh():
    """Returns a mesh of all eight virtual devices: two for rows, four for each parameter."""
    from peft_jax.parallel import MeshSettings, make_mesh

    return make_mesh(MeshSettings(fsdp=2, tensor=2))


@pytest.fixture(scope="session")
def loaded(checkpoint, mesh):
    from peft_jax.generation import load_for_generation

    return load_for_generation(checkpoint, mesh=mesh)


@pytest.fixture
def make_model(loaded, mesh):
    """Returns a function that makes `HarnessModel`s with shared parameters."""
    from eval.model import HarnessModel
    from peft_jax.parallel import batch_sharding

    def make(**settings):
        return HarnessModel(loaded, row_sharding=batch_sharding(mesh), **settings)

    return make


@pytest.fixture(scope="session")
def torch_model(checkpoint):
    """Returns the harness's own backend with the same checkpoint, on torch."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="session")
def one_device():
    """Returns the sharding of rows on one device."""
    from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh

    return batch_sharding(make_mesh(MeshSettings(devices=1)))


@pytest.fixture(scope="session")
def devices():
    return jax.devices()
