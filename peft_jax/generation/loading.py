"""Loads a model, an adapter and a tokenizer for `generate_text`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from peft_jax.adapters import AdapterState
from peft_jax.core import FORMATS, Tree, flatten, unflatten
from peft_jax.core.validation import check_choice
from peft_jax.generation.ends import end_tokens
from peft_jax.hub import find_folder, load_adapter, load_params, read_config
from peft_jax.hub.adapter_base import recorded_quantization
from peft_jax.hub.adapter_files import CONFIG, PEFT_CONFIG
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import CausalLM, ExecutionSettings, build_model
from peft_jax.parallel import sharding_tree
from peft_jax.runtime.files import read_json_object

_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Arguments of `generate_text`.

    Attributes:
      model: Model.
      params: Parameters of the model, with the adapter bound or merged.
      tokenizer: Transformers tokenizer.
      eos_ids: End tokens for `GenerationSettings`, including those of `generation_config.json`.
      quantization: Quantization of the base model's kernels.
    """

    model: CausalLM
    params: Tree
    tokenizer: Any
    eos_ids: tuple[int, ...]
    quantization: str = "none"


def load_for_generation(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    merge: bool = False,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    quantization: str | None = None,
    chat_template: str | Path | None = None,
) -> Loaded:
    """Loads a model, with or without an adapter, for generation.

    Args:
      model: Checkpoint folder, or name on the Hugging Face Hub. None: the base model that the
        adapter's configuration names.
      adapter: Adapter folder (a run's `adapter/`), or name on the Hub.
      merge: Whether to merge the adapter into the parameters instead of binding it. Merging needs
        the parameters' memory twice for a moment, but makes each token cheaper.
      dtype: Dtype of parameters and computation, "float32" or "bfloat16".
      mesh: Mesh to shard the parameters over, by the rules of `peft_jax.parallel`. None: the first
        device.
      quantization: Quantization of the blocks' kernels, one of `peft_jax.core.FORMATS`. None: that
        of the adapter's training if it is recorded, else "none". Merging dequantizes to `dtype`.
      chat_template: File with a Jinja chat template, instead of the tokenizer's own.

    Raises:
      ValueError: Neither model nor adapter is given, or one of them cannot be loaded.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    adapter_folder = None if adapter is None else find_folder(adapter)
    if model is None:
        if adapter_folder is None:
            raise ValueError("neither a model nor an adapter is given; give one of them, or both")
        model = base_of(adapter_folder)
    quantization = choose_quantization(quantization, adapter_folder)
    folder = find_folder(model)
    execution = ExecutionSettings(compute_dtype=dtype)
    causal_lm = dataclasses.replace(build_model(read_config(folder), execution), origin=str(folder))
    # Small files are read first, so that errors in them are found early.
    with_tokenizer = folder
    if adapter_folder is not None and (adapter_folder / _TOKENIZER_CONFIG).is_file():
        with_tokenizer = adapter_folder
    tokenizer = load_tokenizer(with_tokenizer, chat_template=chat_template)
    eos_ids = end_tokens(causal_lm, tokenizer=tokenizer, folder=folder)
    params = load_params(
        folder,
        causal_lm,
        dtype=dtype,
        quantization=quantization,
        sharding=None
        if mesh is None
        else functools.partial(_param_shardings, quantization=quantization, mesh=mesh),
    )
    if adapter_folder is not None:
        spec, state = load_adapter(adapter_folder, causal_lm, params)
        if mesh is not None:
            state = _lay_out(state, spec.axes(params, causal_lm.logical_axes()), mesh)
        params = spec.merge(params, state) if merge else spec.bind(params, state)
    return Loaded(
        model=causal_lm,
        params=params,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        quantization=quantization,
    )


def choose_quantization(asked: str | None, adapter: Path | None) -> str:
    """Returns the quantization of the base model: as asked, or that of the adapter's training.

    Args:
      asked: One of `peft_jax.core.FORMATS`; None for that of the adapter's training.
      adapter: Adapter folder; None without one.

    Raises:
      ValueError: The format is not known.
    """
    if asked is not None:
        check_choice("quantization", asked, FORMATS)
        return asked
    recorded = None if adapter is None else recorded_quantization(adapter)
    return recorded or "none"


def _param_shardings(model: CausalLM, *, quantization: str, mesh: jax.sharding.Mesh) -> Tree:
    shapes = model.abstract_params(quantization=quantization)
    return sharding_tree(model.logical_axes(quantization), mesh, shapes=shapes)


def _lay_out(state: AdapterState, axes: AdapterState, mesh: jax.sharding.Mesh) -> AdapterState:
    """Shards an adapter's arrays over the mesh, without empty branches."""
    trainable, constant = (
        jax.device_put(arrays, sharding_tree(names, mesh, shapes=arrays))
        for arrays, names in (
            (unflatten(flatten(getattr(state, tree))), unflatten(flatten(getattr(axes, tree))))
            for tree in ("trainable", "constant")
        )
    )
    return AdapterState(trainable=trainable, constant=constant)


def base_of(adapter: Path) -> str:
    """Returns the base model that an adapter's configuration names.

    Raises:
      ValueError: There is no configuration, or it names no base model.
    """
    names = [name for name in (CONFIG, PEFT_CONFIG) if (adapter / name).is_file()]
    if not names:
        raise ValueError(f"{adapter} is not an adapter: it has neither {CONFIG} nor {PEFT_CONFIG}")
    base = read_json_object(adapter / names[0]).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{adapter / names[0]} has no base_model_name_or_path; give the model as well"
        )
    return base
