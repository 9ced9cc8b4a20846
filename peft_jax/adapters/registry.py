"""Registers methods by name, including those of other packages."""

import dataclasses
import importlib.metadata
from typing import Any, TypeVar

from peft_jax.adapters.adalora import AdaLoRA
from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.dora import DoRA
from peft_jax.adapters.eva import EVA
from peft_jax.adapters.fourierft import FourierFT
from peft_jax.adapters.full import Full
from peft_jax.adapters.gralora import GraLoRA
from peft_jax.adapters.hira import HiRA
from peft_jax.adapters.hra import HRA
from peft_jax.adapters.hybrid import Hybrid
from peft_jax.adapters.ia3 import IA3
from peft_jax.adapters.ln_tuning import LNTuning
from peft_jax.adapters.loftq import LoftQ
from peft_jax.adapters.loha import LoHa
from peft_jax.adapters.lokr import LoKr
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_fa import LoRAFA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.lora_one import LoRAOne
from peft_jax.adapters.lora_start import OLoRA, PiSSA
from peft_jax.adapters.method import TrainingMethod
from peft_jax.adapters.miss import MiSS
from peft_jax.adapters.oft import OFT
from peft_jax.adapters.p_tuning import PTuning
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.adapters.prefix_tuning import PrefixTuning
from peft_jax.adapters.prompt_tuning import PromptTuning
from peft_jax.adapters.randlora import RandLora
from peft_jax.adapters.shira import SHiRA
from peft_jax.adapters.trainable_tokens import TrainableTokens
from peft_jax.adapters.unitary import Unitary
from peft_jax.adapters.vera import VeRA
from peft_jax.core import did_you_mean

METHODS: dict[str, type[TrainingMethod]] = {
    method.name: method
    for method in (
        Full,
        LNTuning,
        TrainableTokens,
        LoRA,
        DoRA,
        LoRAFA,
        AdaLoRA,
        LoRAGA,
        LoRAOne,
        EVA,
        PiSSA,
        OLoRA,
        LoftQ,
        LoHa,
        LoKr,
        GraLoRA,
        HiRA,
        MiSS,
        VeRA,
        RandLora,
        FourierFT,
        SHiRA,
        IA3,
        BOFT,
        OFT,
        HRA,
        Unitary,
        Hybrid,
        PromptTuning,
        PTuning,
        PrefixTuning,
    )
}


ENTRY_POINTS = "peft_jax.methods"
"""Entry point group in which installed packages offer methods."""

_Method = TypeVar("_Method", bound=type[TrainingMethod])


def register_method(method: _Method) -> _Method:
    """Registers a method by its name, for the command line and adapter files.

    Args:
      method: Dataclass that derives from `AdapterMethod`, with a `name` and a `learning_rate`.

    Returns:
      The method, so that this works as a decorator.

    Raises:
      ValueError: The class is not such a dataclass, or another method has the name.

    Example:
      >>> from peft_jax.adapters import LoRA
      >>> register_method(LoRA).name  # registering the same class again changes nothing
      'lora'
    """
    if not (isinstance(method, type) and issubclass(method, TrainingMethod)):
        raise ValueError(f"{method!r} must be a class derived from peft_jax.adapters.AdapterMethod")
    for required in ("name", "learning_rate"):
        if not hasattr(method, required):
            raise ValueError(
                f"the method {method.__name__} needs a class variable {required!r}, but has none"
            )
    if not dataclasses.is_dataclass(method):
        raise ValueError(f"the method {method.__name__} must be a frozen dataclass")
    if METHODS.get(method.name, method) is not method:
        raise ValueError(
            f"the method {method.__name__} has the name {method.name!r}, which belongs to"
            f" {METHODS[method.name].__name__}; give it another name"
        )
    METHODS[method.name] = method
    return method


def register_installed() -> None:
    """Registers the methods that installed packages offer as entry points."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        register_method(entry.load())


def make_method(name: str, **settings: Any) -> TrainingMethod:
    """Returns the method with this name and these settings.

    Args:
      name: Name of the method.
      **settings: Settings of the method; the others take their defaults.

    Raises:
      ValueError: The name or a setting is not known, or a setting's value is invalid.

    Example:
      >>> make_method("lora", rank=4)
      LoRA(rank=4, alpha=16.0, rank_stabilized=False, dropout=0.0)
      >>> make_method("lora", n_butterfly_factors=4)
      Traceback (most recent call last):
        ...
      ValueError: n_butterfly_factors is not a setting of the method 'lora', but of boft, hybrid
    """
    if name not in METHODS:
        raise ValueError(
            f"there is no method {name!r}{did_you_mean(name, METHODS)}; import the module that"
            " registers another package's method first (--import=MODULE)"
        )
    known = method_settings(name)
    for setting in settings:
        if setting in known:
            continue
        others = [other for other in METHODS if setting in method_settings(other)]
        hint = f", but of {', '.join(others)}" if others else did_you_mean(setting, known)
        raise ValueError(f"{setting} is not a setting of the method {name!r}{hint}")
    return METHODS[name](**settings)


def method_settings(name: str) -> tuple[str, ...]:
    """Returns the names of a method's settings."""
    return tuple(field.name for field in dataclasses.fields(METHODS[name]))


def peft_forms() -> tuple[type[PeftForm], ...]:
    """Returns the forms in which adapters of Hugging Face PEFT are loaded, of all methods."""
    return tuple(dict.fromkeys(form for one in METHODS.values() for form in one.peft_forms()))
