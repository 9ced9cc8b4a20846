"""Implements LoRA: a low-rank product added to the frozen kernel."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.adapters.low_rank import low_rank_product
from peft_jax.adapters.method import (
    AdapterMethod,
    Arrays,
    Axes,
    GradientFactors,
    drop_inputs,
)
from peft_jax.adapters.peft_form import (
    NEUTRAL,
    PeftForm,
    PeftSettings,
    Shapes,
    plain_number,
    setting,
)
from peft_jax.adapters.summed_kernel import prefer_summed_kernel, summed_kernel_product
from peft_jax.core import Kernel, grouped_linear, linear, name_product
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_fraction, check_positive, check_positive_int

_FACTORS = ("a", "b", "a0", "b0")
"""Names of arrays that hold factors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(AdapterMethod):
    """Low-rank adaptation, y = x W + s (x A) B with s = alpha / rank.

    A [d_in, r] is initialized uniformly within ±1/√d_in, as in Hugging Face PEFT, and B [r, d_out]
    with zeros. Trainable arrays: `a`, `b`.

    Attributes:
      rank: Rank r.
      alpha: Numerator of s.
      rank_stabilized: Use s = alpha / √rank instead (Kalajdzievski, 2023, arXiv 2312.03732).
      dropout: Probability that an input of A is dropped while training.

    Source: Hu et al., 2021, arXiv 2106.09685, eq. 3.

    Example:
      >>> LoRA(rank=4, alpha=8.0).scale
      2.0
      >>> LoRA(rank=4, alpha=8.0, rank_stabilized=True).scale
      4.0
    """

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 2e-4
    by_layer: ClassVar[bool] = True
    """Whether layers may differ. It is not inherited, because factors may mean something else."""

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_fraction("dropout", self.dropout)

    @property
    def scale(self) -> float:
        """Factor s on the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the rank exceeds both sides of the kernel."""
        if self.rank > max(shape):
            self.reject_rank(module, shape, most=min(shape))

    def reject_rank(self, module: str, shape: tuple[int, int], *, most: int) -> NoReturn:
        """Raises ValueError: the rank on a kernel [d_in, d_out] may be `most` at most."""
        raise ValueError(
            f"rank is {self.rank}, but {self.name} on the kernel of {module}"
            f" [{shape[0]}, {shape[1]}] needs a rank of at most {most}; set it with rank_pattern,"
            " or exclude the module"
        )

    def check_experts(self, module: str) -> None:
        """Raises ValueError for dropout, for starts from gradients, and for other projections."""
        if type(self).project is not LoRA.project or self.start_rank:
            super().check_experts(module)
        if self.dropout:
            raise ValueError(
                f"dropout is {self.dropout}, but must be 0 for experts such as {module}, as in"
                " Hugging Face PEFT; set it to 0, or leave experts out"
            )

    def check_layers(self, module: str, methods: Sequence[AdapterMethod | None]) -> None:
        """Raises ValueError for subclasses that do not set `by_layer` themselves."""
        if not vars(type(self)).get("by_layer", False):
            raise ValueError(
                f"{self.name} needs the same settings in all layers, but {module} differs between"
                " layers; name modules without layer numbers"
            )

    def start_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence[AdapterMethod | None]
    ) -> tuple[Arrays, Arrays]:
        """Sets the columns of A and the rows of B to zero that a layer does not have."""
        mask = (self._gains(methods) != 0).astype(np.float32)

        def cut(arrays: Arrays) -> Arrays:
            return {
                name: array * _by_layer(mask, array, name) if name in _FACTORS else array
                for name, array in arrays.items()
            }

        return cut(trainable), cut(constant)

    def hold_layers(
        self, trainable: Arrays, constant: Arrays, methods: Sequence[AdapterMethod | None]
    ) -> tuple[Arrays, Arrays]:
        """Multiplies B by each layer's share of this method's scale, and by zero beyond its rank.

        The factors of a layer of smaller rank are padded. Zeros get no gradient and stay zero.
        """
        trainable, constant = super().hold_layers(trainable, constant, methods)
        gains = self._gains(methods)

        def scale(arrays: Arrays) -> Arrays:
            return {
                name: array * _by_layer(gains, array, name).astype(array.dtype)
                if name in ("b", "b0")
                else array
                for name, array in arrays.items()
            }

        return scale(trainable), scale(constant)

    def _gains(self, methods: Sequence[AdapterMethod | None]) -> np.ndarray:
        """Returns the layers' scales relative to this method's, by column, [layers, rank]."""
        gains = np.zeros((len(methods), self.rank), np.float32)
        for layer, method in enumerate(methods):
            if isinstance(method, LoRA):
                gains[layer, : method.rank] = method.scale / self.scale
        return gains

    def neutral(self, shape: tuple[int, int]) -> tuple[Arrays, Arrays]:
        """Returns zeros."""
        d_in, d_out = shape
        return {"a": jnp.zeros((d_in, self.rank)), "b": jnp.zeros((self.rank, d_out))}, {}

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A uniform within ±1/√d_in and B zero; no constant arrays."""
        del gradient
        d_in, d_out = shape
        bound = 1.0 / math.sqrt(d_in)
        a = jax.random.uniform(key, (d_in, self.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard A as the kernel's input and B as its output."""
        return {"a": (d_in, None), "b": (None, d_out)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A and s B."""
        del constant, dropout_key
        return {"a": trainable["a"], "b": self.scale * trainable["b"]}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the axes of both factors."""
        return {"a": (d_in, None), "b": (None, d_out)}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x W + (x A)(s B), as x (W + A (s B)) if that is faster."""
        if self.sums_kernels(dropout_key) and prefer_summed_kernel(x, base):
            return name_product(summed_kernel_product(x, base, arrays["a"], arrays["b"]))
        return linear(x, base) + self.low_rank(x, arrays, dropout_key=dropout_key)

    def sums_kernels(self, dropout_key: jax.Array | None) -> bool:
        """Returns whether A B may be added to the kernel: A has the kernel's inputs, none dropped.

        A subclass with a product of its own, such as one that keeps no inputs, does not.
        """
        own = type(self).low_rank is LoRA.low_rank and type(self).product is LoRA.product
        return own and (dropout_key is None or self.dropout == 0)

    def project_groups(
        self,
        x: Float[Array, "rows d_in"],
        base: Kernel,
        arrays: Arrays,
        sizes: Int[Array, " groups"],
    ) -> Float[Array, "rows d_out"]:
        """Returns x W_g + (x A_g)(s B_g), with factors of each group, by three grouped products."""
        return grouped_linear(x, base, sizes) + self._low_rank_of_groups(x, arrays, sizes)

    @part("low_rank")
    def _low_rank_of_groups(
        self, x: Float[Array, "rows d_in"], arrays: Arrays, sizes: Int[Array, " groups"]
    ) -> Float[Array, "rows d_out"]:
        return grouped_linear(grouped_linear(x, arrays["a"], sizes), arrays["b"], sizes)

    @part("low_rank")
    def low_rank(
        self, x: Float[Array, "*batch d_in"], arrays: Arrays, *, dropout_key: jax.Array | None
    ) -> Float[Array, "*batch d_out"]:
        """Returns the adapter's own term, (x A)(s B)."""
        x = drop_inputs(x, self.dropout, dropout_key)
        return self.product(x, arrays["a"], arrays["b"])

    def product(
        self,
        x: Float[Array, "*batch d_in"],
        a: Float[Array, "d_in rank"],
        b: Float[Array, "rank d_out"],
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x A) B; its backward pass keeps x for the gradient of A."""
        return low_rank_product(x, a, b)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + s A B."""
        return base.astype(jnp.float32) + self.difference(arrays)

    def difference(self, arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns s A B, the adapter's change of the kernel, in float32."""
        a, b = arrays["a"].astype(jnp.float32), arrays["b"].astype(jnp.float32)
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def low_rank_factors(
        self, arrays: Arrays
    ) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]] | None:
        """Returns A and s B; None for a subclass that projects otherwise."""
        return (arrays["a"], arrays["b"]) if type(self).project is LoRA.project else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns LoRA's form."""
        return (LoRAForm,)


def _by_layer(
    values: Float[np.ndarray, "layers rank"], array: Array, name: str
) -> Float[np.ndarray, "..."]:
    """Returns values of each layer and column, shaped to multiply A or B [layers, …]."""
    layers, rank = values.shape
    ones = [1] * (array.ndim - 3)
    return values.reshape(layers, *ones, *((1, rank) if name[0] == "a" else (rank, 1)))


LORA_SETTINGS = PeftSettings(
    read={
        "alpha_pattern": Mapping[str, float],
        "lora_alpha": float,
        "lora_dropout": float,
        "r": int,
        "rank_pattern": Mapping[str, int],
        "trainable_token_indices": tuple[int, ...] | Mapping[str, tuple[int, ...]],
        "use_rslora": bool,
    },
    # Initialization, and details of settings that are themselves rejected.
    irrelevant=frozenset(
        {
            "corda_config",
            # Tied weights are read from the tensors.
            "ensure_weight_tying",
            "eva_config",
            "loftq_config",
            "lora_ga_config",
            "megatron_core",
            "qalora_group_size",
            # Read from the tensors' names, as target_modules is.
            "target_parameters",
        }
    ),
    fixed={
        "alora_invocation_tokens": NEUTRAL,
        "arrow_config": NEUTRAL,
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        "kasa_config": NEUTRAL,
        "layer_replication": NEUTRAL,
        "lora_bias": NEUTRAL,
        "megatron_config": NEUTRAL,
        "monteclora_config": NEUTRAL,
        "use_bdlora": NEUTRAL,
        "use_dora": NEUTRAL,
        "use_qalora": NEUTRAL,
        "velora_config": NEUTRAL,
    },
    why={
        "init_lora_weights": (
            "; this initialization changes the base: save the adapter again in PEFT with"
            " path_initial_model_for_weight_conversion, which converts it to the unchanged base"
        ),
    },
    compared=(
        *("alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_parameters", "use_dora"),
        "trainable_token_indices",
        "use_rslora",
    ),
)


@dataclasses.dataclass(frozen=True)
class LoRAForm(PeftForm):
    """`lora_A.weight` is Aᵀ and `lora_B.weight` is Bᵀ."""

    method: LoRA
    peft_type = "LORA"
    only_bias = "lora_only"
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")
    exact = True
    understood = LORA_SETTINGS
    patterns = MappingProxyType({"r": "rank_pattern", "lora_alpha": "alpha_pattern"})

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> LoRA:
        """Returns LoRA with the rank, alpha and dropout of the configuration."""
        del modules
        return LoRA(**lora_settings(config))

    def settings(self) -> dict[str, Any]:
        """Returns the rank, the alpha that gives the method's scale, and what is fixed."""
        return {
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": plain_number(self.method.alpha),
            "lora_dropout": self.method.dropout,
            "r": self.method.rank,
            "use_dora": False,
            "use_rslora": self.method.rank_stabilized,
        }

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, d_in] and [d_out, r]."""
        rank = self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transposes the factors, without padding beyond the rank."""
        rank = self.method.rank
        return {
            "lora_A.weight": arrays["a"][:, :rank].T,
            "lora_B.weight": arrays["b"][:rank].T,
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the tensors."""
        return {"a": tensors["lora_A.weight"].T, "b": tensors["lora_B.weight"].T}, {}


def lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns LoRA's settings from PEFT's configuration, with PEFT's defaults."""
    return {
        "rank": setting(config, "r", 8),
        "alpha": float(setting(config, "lora_alpha", 8)),
        "rank_stabilized": setting(config, "use_rslora", False),
        "dropout": float(setting(config, "lora_dropout", 0.0)),
    }
