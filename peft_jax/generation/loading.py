"""From the folders that a run reads and leaves to what `generate_text` takes."""

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
    """What `generate_text` takes.

    Attributes:
      model: the model.
      params: its parameters, the adapter bound or merged.
      tokenizer: its transformers tokenizer.
      eos_ids: what ends a text, for `GenerationSettings`; with what `generation_config.json` adds.
      quantization: how the base's kernels are held.
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
    """A model, with or without an adapter, ready to generate.

    Args:
      model: the checkpoint's folder, or its name on the Hugging Face hub; None for the one that the
        adapter's configuration names.
      adapter: the adapter's folder (a run's `adapter/`), or its name on the hub.
      merge: whether the adapter is merged into the parameters, which takes their memory once more
        while it is done and makes each token cheaper, instead of bound.
      dtype: of the parameters and of what is computed, "float32" or "bfloat16".
      mesh: the devices that the parameters are laid out over, by the rules of `peft_jax.parallel`;
        None: the first device.
      quantization: the blocks' kernels as "int8" or "nf4", or "none" for as they are; None: as they
        were while the adapter was trained, where it says so, else "none". Merging makes them arrays
        of `dtype` again.
      chat_template: a file with a Jinja chat template, in place of the tokenizer's own.

    Raises:
      ValueError: neither is given, or one of them cannot be loaded.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    adapter_folder = None if adapter is None else find_folder(adapter)
    if model is None:
        if adapter_folder is None:
            raise ValueError("give a model, an adapter, or both")
        model = base_of(adapter_folder)
    quantization = choose_quantization(quantization, adapter_folder)
    folder = find_folder(model)
    execution = ExecutionSettings(compute_dtype=dtype)
    causal_lm = dataclasses.replace(build_model(read_config(folder), execution), origin=str(folder))
    # What is small is read first, so that what is wrong with it is found first.
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
    """How the base's kernels are held: as asked, or as they were while the adapter was trained.

    Args:
      asked: "none", "int8" or "nf4"; None: whatever the adapter says.
      adapter: the adapter's folder; None without one.

    Raises:
      ValueError: the format is not known.
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
    """An adapter's arrays on the devices; empty branches are left out."""
    trainable, constant = (
        jax.device_put(arrays, sharding_tree(names, mesh, shapes=arrays))
        for arrays, names in (
            (unflatten(flatten(getattr(state, tree))), unflatten(flatten(getattr(axes, tree))))
            for tree in ("trainable", "constant")
        )
    )
    return AdapterState(trainable=trainable, constant=constant)


def base_of(adapter: Path) -> str:
    """The base that an adapter's configuration names.

    Raises:
      ValueError: there is no configuration, or it names none.
    """
    names = [name for name in (CONFIG, PEFT_CONFIG) if (adapter / name).is_file()]
    if not names:
        raise ValueError(f"{adapter} holds no adapter: it has neither {CONFIG} nor {PEFT_CONFIG}")
    base = read_json_object(adapter / names[0]).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter / names[0]} does not say what base it is for: give the model")
    return base
