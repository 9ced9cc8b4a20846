"""The real tiny checkpoint, as the harness sees it through our models and through torch."""

import pytest

pytest.importorskip("lm_eval", reason="evaluation needs the extra 'eval'")

import jax


@pytest.fixture(scope="session")
def checkpoint(shared_data):
    """A real pretrained Llama of 656,000 parameters, with a context of 512 tokens."""
    return shared_data / "models" / "tinystories656K"


@pytest.fixture(scope="session")
def mesh():
    """All eight virtual devices: two for rows, and each parameter cut over four."""
    from peft_jax.parallel import MeshSettings, make_mesh

    return make_mesh(MeshSettings(fsdp=2, tensor=2))


@pytest.fixture(scope="session")
def loaded(checkpoint, mesh):
    from peft_jax.generation import load_for_generation

    return load_for_generation(checkpoint, mesh=mesh)


@pytest.fixture
def make_model(loaded, mesh):
    """Makes our model for the harness, in front of the same parameters."""
    from eval.model import HarnessModel
    from peft_jax.parallel import batch_sharding

    def make(**settings):
        return HarnessModel(loaded, row_sharding=batch_sharding(mesh), **settings)

    return make


@pytest.fixture(scope="session")
def torch_model(checkpoint):
    """The harness's own backend: the same checkpoint in transformers, on torch."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="session")
def one_device():
    """How rows are laid out on one device."""
    from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh

    return batch_sharding(make_mesh(MeshSettings(devices=1)))


@pytest.fixture(scope="session")
def devices():
    return jax.devices()
