"""Tests layers of every method that Hugging Face PEFT has against PEFT's on torch."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from peft_jax.adapters import (
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterMethod,
    DoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    MiSS,
    OLoRA,
    PiSSA,
    RandLora,
    SHiRA,
    VeRA,
)
from peft_jax.core import AdaptedKernel, linear

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

D_IN, D_OUT, TOKENS = 12, 8, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and PEFT's configuration of it.

    Attributes:
      method: The method.
      config: Name of PEFT's class of settings.
      settings: Settings that the form's own do not contain.
      bias: Whether the base has a bias.
      d_in: Number of inputs.
      d_out: Number of outputs.
      same_gradients: Whether the form only permutes entries, so that gradients are compared.
    """

    method: AdapterMethod
    config: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: bool = True
    d_in: int = D_IN
    d_out: int = D_OUT
    same_gradients: bool = True


CASES = {
    "lora": Case(LoRA(rank=3, alpha=5.0), "LoraConfig"),
    "dora": Case(DoRA(rank=3, alpha=5.0), "LoraConfig"),
    "dora rank-stabilized": Case(DoRA(rank=2, rank_stabilized=True), "LoraConfig"),
    "dora without a bias": Case(DoRA(rank=2), "LoraConfig", bias=False),
    "lora_fa": Case(LoRAFA(rank=3), "LoraConfig", same_gradients=False),
    "vera": Case(VeRA(rank=5, d_initial=4.0), "VeraConfig", same_gradients=False),
    "randlora": Case(RandLora(rank=3, alpha=6.0), "RandLoraConfig"),
    "randlora of a narrow kernel": Case(RandLora(rank=5), "RandLoraConfig", d_in=7, d_out=16),
    "randlora of held bases": Case(RandLora(rank=9, hold_bases=True), "RandLoraConfig"),
    "fourierft": Case(FourierFT(n_frequency=40), "FourierFTConfig"),
    "fourierft of another seed": Case(
        FourierFT(n_frequency=96, scaling=30.0, seed=2**33 + 5), "FourierFTConfig"
    ),
    "shira": Case(SHiRA(rank=2, seed=3), "ShiraConfig"),
    "adalora": Case(AdaLoRA(rank=3), "AdaLoraConfig"),
    "pissa": Case(PiSSA(rank=3), "LoraConfig"),
    "olora": Case(OLoRA(rank=3, rank_stabilized=True), "LoraConfig"),
    "loha": Case(LoHa(rank=2), "LoHaConfig"),
    "loha rank-stabilized": Case(LoHa(rank=3, rank_stabilized=True), "LoHaConfig"),
    "lokr": Case(LoKr(rank=1), "LoKrConfig"),
    "lokr by a factor": Case(LoKr(rank=1, decompose_factor=2), "LoKrConfig"),
    "lokr by a factor that does not divide": Case(LoKr(rank=1, decompose_factor=5), "LoKrConfig"),
    "gralora": Case(GraLoRA(rank=4, alpha=5.0), "GraloraConfig"),
    "hybrid gralora": Case(
        GraLoRA(rank=8, blocks=4, hybrid_rank=3, rank_stabilized=True), "GraloraConfig"
    ),
    "hira": Case(HiRA(rank=3), "HiraConfig"),
    "miss": Case(MiSS(rank=4), "MissConfig"),
    "miss with padding": Case(MiSS(rank=5), "MissConfig"),
    "ia3": Case(IA3(), "IA3Config", {"feedforward_modules": []}, bias=False),
    "ia3 of inputs": Case(IA3(scales_input=True), "IA3Config", {"feedforward_modules": ["0"]}),
    "oft": Case(OFT(block_size=4), "OFTConfig"),
    "oft of six terms": Case(OFT(block_size=3, neumann_terms=6), "OFTConfig"),
    "oft exact": Case(OFT(block_size=6, neumann_terms=0), "OFTConfig"),
    "oft shared": Case(OFT(block_size=4, share_blocks=True), "OFTConfig"),
    "hra": Case(HRA(rank=4), "HRAConfig"),
}


@dataclasses.dataclass
class Layers:
    """The same adapted layer here and in PEFT, away from the start."""

    case: Case
    module: Any
    kernel: jax.Array
    bias: np.ndarray
    trainable: dict[str, jax.Array]
    constant: dict[str, jax.Array]
    tensors: dict[str, np.ndarray]

    def apply(self, trainable: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        method = self.case.method
        arrays = method.prepare(trainable, self.constant)
        return linear(x, AdaptedKernel(base=self.kernel, arrays=arrays, method=method)) + self.bias


SLOW = ("randlora of held bases", "fourierft of another seed")
"""Cases whose kind another one covers in the fast suite."""


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def layers(request: pytest.FixtureRequest, key: jax.Array) -> Layers:
    case = CASES[request.param]
    method, d_in, d_out = case.method, case.d_in, case.d_out
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (d_in, d_out)) / 2
    bias = np.arange(d_out, dtype=np.float32) if case.bias else np.zeros(d_out, np.float32)
    given = {"kernel": kernel} if method.uses_kernel else {}
    trainable, constant = method.init(key, (d_in, d_out), **given)
    trainable = {
        name: leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, 9 + index), leaf.shape)
        for index, (name, leaf) in enumerate(trainable.items())
    }
    module = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=case.bias))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor(np.asarray(kernel).T))
        if case.bias:
            module[0].bias.copy_(torch.tensor(bias))
    form = method.peft_form()
    settings = {**form.settings(), **case.settings}
    adapted = peft.get_peft_model(
        module, getattr(peft, case.config)(target_modules=["0"], **settings)
    )
    arrays = {name: np.asarray(array) for name, array in {**trainable, **constant}.items()}
    tensors = form.export(arrays)
    assert {name: tensor.shape for name, tensor in tensors.items()} == form.shapes(d_in, d_out)
    stored = {
        f"base_model.model.0.{name}": torch.tensor(np.ascontiguousarray(tensor))
        for name, tensor in tensors.items()
    }
    fixed = {name: np.asarray(array) for name, array in constant.items()}
    for name, tensor in form.shared([(d_in, d_out)], [fixed]).items():
        stored[f"base_model.{name}"] = torch.tensor(tensor)
    report = peft.set_peft_model_state_dict(adapted, stored)
    assert not report.unexpected_keys
    missing = [key for key in report.missing_keys if adapted.prefix in key]
    # Layers also list the tensors that all of them share.
    assert not [key for key in missing if key.split(".")[-2] not in form.shared_names]
    return Layers(case, adapted, kernel, bias, trainable, constant, tensors)


def test_the_entries_of_a_seed_are_those_of_peft() -> None:
    from peft.tuners.shira.mask_functions import random_mask

    mask = random_mask(torch.nn.Linear(D_IN, D_OUT), 2, random_seed=2**33 + 7)
    _, constant = SHiRA(rank=2, seed=2**33 + 7).init(jax.random.key(0), (D_IN, D_OUT))
    np.testing.assert_array_equal(constant["indices"], np.stack(np.nonzero(mask.numpy())))


def assert_close(found: Any, expected: np.ndarray) -> None:
    """Asserts an error of at most 1e-5 of the largest value."""
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(size, 1.0))


@pytest.mark.fast(
    "lora",
    "dora",
    "dora without a bias",
    "lora_fa",
    "vera",
    "randlora of a narrow kernel",
    "fourierft",
    "shira",
    "adalora",
    "pissa",
    "olora",
    "loha",
    "lokr",
    "gralora",
    "hira",
    "miss",
    "miss with padding",
    "ia3*",
    "oft",
    "oft exact",
    "oft shared",
    "hra",
)
def test_layer_agrees_with_peft(layers: Layers, key: jax.Array) -> None:
    x = jax.random.normal(key, (TOKENS, layers.case.d_in))
    found = layers.apply(layers.trainable, x)
    expected = layers.module(torch.tensor(np.asarray(x))).detach().numpy()
    assert_close(found, expected)
    assert np.abs(np.asarray(x @ layers.kernel + layers.bias) - expected).max() > 0.1


def test_merged_kernel_agrees_with_peft(layers: Layers) -> None:
    method = layers.case.method
    merged = method.merge(layers.kernel, method.prepare(layers.trainable, layers.constant))
    expected = layers.module.merge_and_unload()[0].weight.detach().numpy().T
    assert_close(merged, expected)


@pytest.mark.fast(
    "lora",
    "dora",
    "lora_fa",
    "vera",
    "adalora",
    "pissa",
    "loha",
    "lokr",
    "gralora",
    "hira",
    "miss",
    "ia3 of inputs",
    "oft",
    "oft exact",
    "hra",
    "randlora of a narrow kernel",
    "shira",
)
def test_gradients_agree_with_peft(layers: Layers, key: jax.Array) -> None:
    x, cotangent = (
        jax.random.normal(jax.random.fold_in(key, i), (TOKENS, size))
        for i, size in enumerate((layers.case.d_in, layers.case.d_out))
    )
    _, pull = jax.vjp(layers.apply, layers.trainable, x)
    of_arrays, of_x = pull(cotangent)
    there = torch.tensor(np.asarray(x), requires_grad=True)
    layers.module(there).backward(torch.tensor(np.asarray(cotangent)))
    assert_close(of_x, there.grad.numpy())
    if not layers.case.same_gradients:
        return
    form = layers.case.method.peft_form()
    parameters = {
        name.replace(".default", "").removeprefix("base_model.model.0."): parameter.grad.numpy()
        for name, parameter in layers.module.named_parameters()
        if parameter.requires_grad
    }
    found = {
        name: next(
            (value for key, value in parameters.items() if key.startswith(name)),
            layers.tensors[name],  # a constant
        )
        for name in form.names
    }
    expected, _ = form.restore(found)
    for name, gradient in of_arrays.items():
        assert_close(gradient, expected[name])
