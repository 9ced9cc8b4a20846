"""Defines the settings that select what an adapter trains, and the selection in one model."""

import dataclasses
from collections.abc import Mapping

from peft_jax.adapters.method import AdapterMethod
from peft_jax.adapters.trainable_tokens import TrainableTokens
from peft_jax.core import Path
from peft_jax.core.validation import check_choice, check_positive, check_positive_int

ALL_LINEAR = "all-linear"
"""Selects every linear map but the output head, experts and their routers.

Hugging Face PEFT's "all-linear" adapts the experts and routers of some families too.
"""

BIASES = ("none", "all", "adapted")
"""Which biases are trained: none, all of the model's, or those of the adapted modules."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """Leaves of a model that an `AdapterSpec` trains.

    Attributes:
      adapted: Methods by path of the adapted kernel; of layers that differ, the widest one.
      trained: Paths of leaves trained in full, without an adapter.
      biases: Those of `trained` that `bias` selects.
      selected: Those of `trained` that `target_modules` selects.
      by_layer: Methods of each layer, or None where it is not adapted, by path of the kernels whose
        layers differ.
    """

    adapted: dict[Path, AdapterMethod]
    trained: tuple[Path, ...]
    by_layer: dict[Path, tuple[AdapterMethod | None, ...]] = dataclasses.field(default_factory=dict)
    biases: tuple[Path, ...] = ()
    selected: tuple[Path, ...] = ()

    def layers(self, path: Path, count: int) -> tuple[AdapterMethod | None, ...]:
        """Returns the methods of `count` layers of an adapted kernel."""
        return self.by_layer.get(path, (self.adapted[path],) * count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Settings that select the modules to adapt and to train in full.

    Attributes:
      target_modules: Modules to adapt: "all-linear" (every linear map but the output head, experts
        with their router and those of `modules_to_save`), module names (last parts such as "q_proj"
        or "mlp.up_proj"), or one regular expression. Names with a layer number
        ("layers.0.mlp.up_proj") select that layer alone. With `Full`, "all-linear" selects every
        parameter of the model, and with `LNTuning` every norm.
      exclude_modules: Names, or one regular expression, of modules to leave out.
      layers_to_transform: Numbers of the layers to adapt, from 0; empty for all of them. With it,
        modules outside the layers are not adapted.
      rank_pattern: Ranks of modules by name or regular expression, also with layer numbers; the
        first match applies.
      alpha_pattern: Alphas of modules in the same form.
      modules_to_save: Names of modules to train in full.
      trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapters.
      share_experts: Whether the adapted experts of a layer share one adapter; otherwise each has
        its own.
      bias: Biases to train beside the adapters: "none", "all" of the model's, or those of the
        "adapted" modules.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()
    share_experts: bool = False
    bias: str = "none"

    def __post_init__(self) -> None:
        for setting in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, setting)
            if not isinstance(value, str):
                object.__setattr__(self, setting, tuple(value))
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                "modules_to_save must be a list of names, but is the string"
                f" {self.modules_to_save!r}"
            )
        TrainableTokens(token_indices=self.trainable_token_indices)  # checks them
        object.__setattr__(self, "trainable_token_indices", tuple(self.trainable_token_indices))
        check_choice("bias", self.bias, BIASES)
        if self.target_modules == ():
            raise ValueError("target_modules is empty; name modules, or give 'all-linear'")
        object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        for layer in self.layers_to_transform:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"layers_to_transform has {layer!r}; it must be layer numbers from 0"
                )
        for pattern, rank in self.rank_pattern.items():
            check_positive_int(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_positive(f"alpha_pattern[{pattern!r}]", alpha)
