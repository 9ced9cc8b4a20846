"""Writes and checks Hugging Face PEFT's `adapter_config.json`."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft_jax.adapters import AdapterSpec, Targets, peft_forms
from peft_jax.adapters.lora_embedding import LoRAEmbedding
from peft_jax.adapters.names import matches_name
from peft_jax.adapters.peft_form import NEUTRAL, PeftForm
from peft_jax.adapters.trainable_tokens import TokensBesideAdapters, TokensBesideForm
from peft_jax.adapters.virtual_form import VirtualForm
from peft_jax.core import Path as TreePath
from peft_jax.core import did_you_mean, is_experts, is_router, join_path
from peft_jax.core.typed_settings import convert
from peft_jax.hub.adapter_arrays import modules_of
from peft_jax.hub.adapter_files import CONFIG
from peft_jax.hub.peft_experts import parameter_name, target_parameters
from peft_jax.hub.peft_names import all_modules, matches_saved, short_names
from peft_jax.hub.peft_virtual import write_virtual_config
from peft_jax.models import Model, SequenceClassifier
from peft_jax.models.naming import CLASSIFIER

HEAD = "lm_head"
"""Hugging Face's name of the output head."""

_IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        # How PEFT finds the base's kernels stored, which the checkpoint's family says here.
        "fan_in_fan_out",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        # Which modules and layers are adapted is read from the tensors' names.
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    }
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS"),
}

_WHY = {"task_type": "; only adapters of causal language models and of classifiers are supported"}

_TYPES: Mapping[str, Any] = {
    "base_model_name_or_path": str,
    "modules_to_save": tuple[str, ...],
    "target_modules": str | tuple[str, ...],
}
"""Types of every method's settings that are not null."""

_COMPARED = ("bias", "modules_to_save", "peft_type", "target_modules")


def write_peft_config(
    model: Model, spec: AdapterSpec, targets: Targets, form: PeftForm, *, base_model_name: str
) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`.

    Args:
      model: Base model.
      spec: Adapter specification.
      targets: Targets of `spec` in this model.
      form: PEFT form of the arrays.
      base_model_name: Path of the base, or its name on the hub.
    """
    if isinstance(form, VirtualForm):
        return write_virtual_config(model, form, base_model_name=base_model_name)
    modules = all_modules(model)
    whole = [path for path in targets.trained if path not in (*targets.biases, *targets.selected)]
    saved = short_names(model, whole, modules, matches_saved)
    if tied_embedding(model, targets):
        saved.append(HEAD)
    is_classifier = isinstance(model, SequenceClassifier)
    if is_classifier and any(path[0] == CLASSIFIER for path in whole):
        # PEFT saves a classifier's head as one module, even if it has several layers.
        heads = {
            name
            for path in whole
            if path[0] == CLASSIFIER
            for name in short_names(model, [path], modules, matches_saved)
        }
        saved = sorted({*saved} - heads | {CLASSIFIER})
    settings = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "peft_type": form.peft_type,
        "target_modules": _target_modules(model, targets, modules),
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
    }
    if form.saves_modules:
        settings["modules_to_save"] = saved or None
    settings |= form.settings()
    if tokens := [m for m in targets.adapted.values() if isinstance(m, TokensBesideAdapters)]:
        settings |= TokensBesideForm(tokens[0]).settings()
    if targets.biases:
        settings["bias"] = "all" if spec.bias == "all" else form.only_bias
    if parameters := target_parameters(targets):
        settings["target_parameters"] = parameters
    if "fan_in_fan_out" in settings:
        settings["fan_in_fan_out"] = model.family.naming.conv1d
    for setting, attribute in form.module_lists.items():
        listed = [path for path, method in targets.adapted.items() if getattr(method, attribute)]
        settings[setting] = short_names(model, listed, modules, matches_name)
    for setting, pattern in form.patterns.items():
        settings[pattern] = _pattern(model, targets, setting, settings[setting])
    return settings


def _target_modules(model: Model, targets: Targets, modules: Collection[str]) -> list[str]:
    """Returns short names of modules in all layers, and full names of modules in some."""
    some = {
        path
        for path, methods in targets.by_layer.items()
        if any(method is None for method in methods)
    }
    as_modules = [
        path
        for path, method in targets.adapted.items()
        if not (is_experts(path) or is_router(path))
        and not isinstance(method, TokensBesideAdapters)
    ]
    whole = [path for path in as_modules if path not in some]
    names = short_names(model, [*whole, *targets.selected], modules, matches_name)
    for path in sorted(some):
        names += [
            module
            for module, method in zip(modules_of(model, path), targets.by_layer[path], strict=True)
            if method is not None
        ]
    return names


def _pattern(model: Model, targets: Targets, setting: str, common: Any) -> dict[str, Any]:
    """Returns the values of a setting that differ from the common one, by module."""
    adapted = [module for path in targets.adapted for module in modules_of(model, path)]
    found: dict[str, Any] = {}
    for path in targets.adapted:
        own = modules_of(model, path)
        methods = targets.layers(path, len(own))
        values = {
            module: form.settings()[setting]
            for module, method in zip(own, methods, strict=True)
            if method is not None and (form := method.peft_form()) and setting in form.settings()
        }
        if values and len(values) == len(own) and len(set(values.values())) == 1:
            values = dict.fromkeys(
                short_names(model, [path], adapted, matches_name), values[own[0]]
            )
        found |= {
            parameter_name(path, module): value
            for module, value in values.items()
            if value != common
        }
    return found


def tied_embedding(model: Model, targets: Targets) -> TreePath | None:
    """Returns the path of the embedding if it is fully trainable and tied to the head, else None.

    PEFT copies trainable modules, so the head would keep its old values. The same tensor is
    therefore saved for both.
    """
    if not model.config.tie_word_embeddings:
        return None
    return next((path for path in targets.trained if path[-1] == "embedding"), None)


def check_peft_config(config: Mapping[str, Any], file: Path) -> type[PeftForm]:
    """Checks the content of `adapter_config.json`, and returns the form of the adapter's tensors.

    Args:
      config: Content of `adapter_config.json`.
      file: Its path, for messages.

    Raises:
      ValueError: A setting is unknown or not implemented; the message names it.
    """
    forms = [form for form in peft_forms() if form.reads(config)]
    if not forms:
        peft_type = config.get("peft_type")
        raise ValueError(
            f"{file} sets peft_type = {peft_type!r}, which is not implemented"
            f"{did_you_mean(str(peft_type), {form.peft_type for form in peft_forms()})}"
        )
    form = max(forms, key=lambda form: len(form.marks))
    settings = form.understood
    for name, annotation in {**_TYPES, **settings.read}.items():
        if config.get(name) is not None:
            convert(config[name], annotation, where=f"{file}: {name}")
    for name in form.patterns:
        if name in config and config[name] is None:
            raise ValueError(
                f"{file} sets {name} to null, which PEFT cannot use; set the value that the adapter"
                " was trained with"
            )
    biases = ("none", "all", form.only_bias) if form.only_bias else ("none",)
    fixed, why = {**_FIXED, "bias": biases, **settings.fixed}, {**_WHY, **settings.why}
    for name, value in config.items():
        if name in settings.read or name in _IRRELEVANT or name in settings.irrelevant:
            continue
        allowed = fixed.get(name, NEUTRAL)
        if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
            fault = "not implemented" if name in fixed else "an unknown setting"
            raise ValueError(f"{file} sets {name} = {value!r}, which is {fault}{why.get(name, '')}")
    return form


def check_scaled_biases(model: Model, forms: Mapping[TreePath, PeftForm], *, what: str) -> None:
    """Raises ValueError if PEFT's layer scales a bias, which an adapted kernel does not have.

    Args:
      model: Base model.
      forms: Forms by the adapted kernels' paths.
      what: Name of the adapter in messages.

    Raises:
      ValueError: An adapted module has a bias that PEFT scales.
    """
    leaves = model.hf_names()
    scaled = [
        ".".join(path[:-1])
        for path, form in forms.items()
        if form.scales_bias and (*path[:-1], "bias") in leaves
    ]
    if scaled:
        raise ValueError(
            f"{what} adapts {', '.join(scaled)}, whose bias PEFT scales too, but an adapted kernel"
            " here leaves the bias as it is; merge the adapter and use the whole model"
        )


def check_tied_tables(model: Model, targets: Targets, *, what: str) -> None:
    """Raises ValueError if LoRA is on an embedding that is tied to the head.

    PEFT then adapts the lookup alone, and merges into both. Here both are adapted.

    Args:
      model: Base model.
      targets: Targets of the adapter.
      what: Name of the adapter in messages.

    Raises:
      ValueError: It is.
    """
    tied = [
        join_path(path[:-1])
        for path, method in targets.adapted.items()
        if isinstance(method, LoRAEmbedding)
    ]
    if tied and model.config.tie_word_embeddings:
        raise ValueError(
            f"{what} adapts {', '.join(tied)}, which config.json ties to the head: PEFT adapts the"
            " lookup alone, but merges into both; merge the adapter and use the whole model"
        )


def check_unchanged(stored: Mapping[str, Any], written: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError if PEFT's configuration was changed since it was written.

    It would then contradict this library's own configuration.

    Args:
      stored: Content of `adapter_config.json`.
      written: Content that this library writes for the adapter.
      file: Path of `adapter_config.json`, for messages.
    """
    form = check_peft_config(stored, file)
    changed = [
        f"{name} is {stored.get(name)!r}, not {written[name]!r}"
        for name in sorted((*_COMPARED, *form.understood.compared))
        if name in written and _unordered(stored.get(name)) != _unordered(written[name])
    ]
    if changed:
        raise ValueError(
            f"{file} was changed since peft_jax wrote it: {'; '.join(changed)}. To load the adapter"
            f" as PEFT reads it, delete {CONFIG} in the same folder"
        )


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
