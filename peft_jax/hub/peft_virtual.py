"""Virtual tokens in the files of Hugging Face PEFT: one tensor, and settings of their sizes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.adapters.virtual_form import TENSOR, VirtualForm
from peft_jax.adapters.virtual_method import Dimensions
from peft_jax.core import VIRTUAL, Tree
from peft_jax.hub.adapter_arrays import check_tensors, read_tensor
from peft_jax.hub.tensors import StoredTensor, TensorToWrite
from peft_jax.models import Model


def write_virtual_config(
    model: Model, form: VirtualForm, *, base_model_name: str
) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`.

    Args:
      model: Base model.
      form: PEFT form of the virtual tokens.
      base_model_name: Path of the base, or its name on the hub.
    """
    sizes = Dimensions.of(model.abstract_params())
    width = form.token_dim(sizes)
    return {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "num_attention_heads": width // model.config.head_dim
        if width == sizes.kv_width
        else model.config.num_heads,
        "num_layers": sizes.layers,
        "peft_type": form.peft_type,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
        **form.settings(),
    }


def virtual_tensor(form: VirtualForm, state: AdapterState) -> TensorToWrite:
    """Returns the tensor of virtual tokens."""
    arrays = {name: np.asarray(array) for name, array in state.trainable[VIRTUAL].items()}
    tensor = np.ascontiguousarray(form.export(arrays)[TENSOR])
    return TensorToWrite(name=TENSOR, dtype=tensor.dtype, shape=tensor.shape, fetch=lambda: tensor)


def read_virtual_spec(
    config: Mapping[str, Any],
    form: type[VirtualForm],
    stored: Mapping[str, StoredTensor],
    *,
    what: str,
) -> AdapterSpec:
    """Reads the specification of virtual tokens in PEFT's files.

    Args:
      config: Content of `adapter_config.json`, checked by `check_peft_config`.
      form: Form of the tensor.
      stored: Tensors by name.
      what: Name of the adapter in messages.

    Raises:
      ValueError: There is no such tensor, or the number of virtual tokens is invalid.
    """
    if TENSOR not in stored:
        raise ValueError(f"{what} lacks {TENSOR}")
    count = config.get("num_virtual_tokens")
    rows = stored[TENSOR].shape[0] if stored[TENSOR].shape else 0
    try:
        method = form.read_virtual(config, rows if count is None else count)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
    is_bfloat16 = stored[TENSOR].dtype == "BF16"
    return AdapterSpec(method=method, dtype="bfloat16" if is_bfloat16 else "float32")


def check_virtual_tensor(
    stored: Mapping[str, StoredTensor], form: VirtualForm, params: Tree, *, what: str
) -> None:
    """Raises ValueError unless the only tensor is that of virtual tokens of this base."""
    check_tensors({TENSOR: form.virtual_shape(Dimensions.of(params))}, stored, what)


def read_virtual_state(
    stored: Mapping[str, StoredTensor], form: VirtualForm, spec: AdapterSpec, params: Tree
) -> AdapterState:
    """Reads the arrays of virtual tokens from a tensor that passed `check_virtual_tensor`."""
    tensor = read_tensor(stored[TENSOR]).astype(np.dtype(spec.dtype))
    arrays = form.restore_virtual(tensor, Dimensions.of(params))
    own = {name: jnp.asarray(array) for name, array in arrays.items()}
    return AdapterState(trainable={VIRTUAL: own}, constant={})
