"""Adapters of experts and routers in the files of Hugging Face PEFT.

In transformers, the kernels of all experts are one parameter, and a router's is a parameter too.
PEFT adapts parameters by LoRA, under `target_parameters`. Its tensors hold the factors of all
experts, E of them:

    …mlp.experts.base_layer.lora_A.weight    [E r, d_in]     of gate_up_proj, expert by expert
    …mlp.experts.base_layer.lora_B.weight    [d_out, r E]    rank by rank
    …mlp.experts.lora_A.weight               those of down_proj

One parameter of a module is wrapped inside the other. If only one of them is adapted, its names
have no "base_layer".

PEFT takes a parameter [E, m, n] for kernels [out, in], unless its module says that they are stored
[in, out]. Where a module stores them so and does not say it, A and B change places.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from peft_jax.adapters import Targets
from peft_jax.adapters.lora import LoRAForm
from peft_jax.adapters.peft_form import NoPeftFormError, PeftForm, Shapes
from peft_jax.core import Path, is_experts, is_router
from peft_jax.hub.adapter_arrays import modules_of
from peft_jax.models import TrainableModel

_INNER, _OUTER = "gate_up_proj", "down_proj"
_BASE = "base_layer"


@dataclasses.dataclass(frozen=True)
class ExpertsForm(PeftForm):
    """The tensors of all experts of one layer.

    Attributes:
      method: The method.
      form: Form of one expert's tensors.
      experts: E.
      swapped: Whether PEFT takes the kernels' inputs for their outputs.
    """

    peft_type = LoRAForm.peft_type
    names = LoRAForm.names
    exact = True
    understood = LoRAForm.understood

    form: LoRAForm
    experts: int
    swapped: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings of one expert."""
        return self.form.settings()

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [E r, d_in] and [d_out, r E], or with d_out and d_in."""
        if self.swapped:
            d_in, d_out = d_out, d_in
        rank, _ = self.form.shapes(d_in, d_out)["lora_A.weight"]
        joined = rank * self.experts
        return {"lora_A.weight": (joined, d_in), "lora_B.weight": (d_out, joined)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Joins the tensors of experts."""
        each = [
            self._ordered(self.form.export({name: array[expert] for name, array in arrays.items()}))
            for expert in range(self.experts)
        ]
        b = np.stack([tensors["lora_B.weight"] for tensors in each], axis=-1)
        return {
            "lora_A.weight": np.concatenate([tensors["lora_A.weight"] for tensors in each]),
            "lora_B.weight": b.reshape(b.shape[0], -1),
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits the tensors by expert."""
        a = np.split(tensors["lora_A.weight"], self.experts)
        joined = tensors["lora_B.weight"]
        b = joined.reshape(joined.shape[0], -1, self.experts)
        each = [
            self.form.restore(
                self._ordered({"lora_A.weight": a[expert], "lora_B.weight": b[..., expert]})
            )
            for expert in range(self.experts)
        ]
        trainable, constant = (
            {name: np.stack([one[at][name] for one in each]) for name in each[0][at]}
            for at in range(2)
        )
        return trainable, constant

    def _ordered(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns the tensors of one expert in PEFT's order, or in the method's."""
        if not self.swapped:
            return tensors
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return {"lora_A.weight": b.T, "lora_B.weight": a.T}


def form_of_leaf(
    form: PeftForm, path: Path, shape: tuple[int, ...], *, swapped: bool = False
) -> PeftForm:
    """Returns the form of a layer's tensors: that of all experts, if the leaf belongs to experts.

    Args:
      form: Form of one kernel's tensors.
      path: Path of the kernels.
      shape: Shape of the leaf.
      swapped: Whether PEFT takes the inputs of experts' kernels for their outputs.

    Raises:
      NoPeftFormError: PEFT has no such adapter of experts.
    """
    if not is_experts(path):
        return form
    if not isinstance(form, LoRAForm):
        raise NoPeftFormError(
            f"PEFT adapts experts by LoRA only, and {'.'.join(path[:-1])} has"
            f" {form.method.name!r}; export the merged model instead"
        )
    return ExpertsForm(form.method, form, shape[-3], swapped)


def check_all_layers(targets: Targets) -> None:
    """Raises NoPeftFormError if experts or routers are adapted in some layers only."""
    for path, methods in targets.by_layer.items():
        if None in methods and (is_experts(path) or is_router(path)):
            raise NoPeftFormError(
                f"PEFT adapts parameters in all layers, but {'.'.join(path[:-1])} is adapted in"
                " some; export the merged model instead"
            )


def wrappers(model: TrainableModel, path: Path, adapted: Collection[Path]) -> list[str]:
    """Returns the names of PEFT's layers that hold the tensors of an adapted kernel.

    Args:
      model: Base model.
      path: Path of the kernel.
      adapted: Paths of all adapted kernels.
    """
    modules = modules_of(model, path)
    if not is_experts(path):
        return modules
    outer = (*path[:-2], _OUTER, path[-1])
    inside = path[-2] == _INNER and outer in adapted
    parents = [module.rpartition(".")[0] for module in modules]
    return [f"{parent}.{_BASE}" for parent in parents] if inside else parents


def parameter_name(path: Path, module: str) -> str:
    """Returns PEFT's name of an adapted kernel, by which its patterns match."""
    return f"{module}.weight" if is_router(path) else module


def target_parameters(targets: Targets) -> list[str]:
    """Returns the kernels that PEFT adapts as parameters: "mlp.experts.down_proj", ….

    Example:
      >>> from peft_jax.adapters import LoRA
      >>> target_parameters(Targets({("layers", "mlp", "gate", "kernel"): LoRA()}, ()))
      ['mlp.gate.weight']
    """
    return sorted(
        parameter_name(path, ".".join(path[1:-1]))
        for path in targets.adapted
        if is_experts(path) or is_router(path)
    )


def adapted_experts(
    config: Mapping[str, Any], stored: Collection[str], leaves: Collection[Path]
) -> set[Path]:
    """Returns the kernels of experts that an adapter of PEFT adapts.

    Args:
      config: Content of `adapter_config.json`.
      stored: Names of the tensors.
      leaves: Paths of all leaves of the model.
    """
    kernels = {path for path in leaves if is_experts(path) and path[-1] == "kernel"}
    if any(f".experts.{_BASE}." in name for name in stored):
        return kernels
    listed = config.get("target_parameters") or []
    return {path for path in kernels if any(name.rpartition(".")[2] == path[-2] for name in listed)}
