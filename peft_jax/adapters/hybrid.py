"""Implements the hybrid: a low-rank branch and a rotation branch on one kernel."""

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.names import matches_name
from peft_jax.adapters.summed_kernel import prefer_summed_kernel, rotated_kernel_sum_product
from peft_jax.adapters.unitary import Unitary
from peft_jax.core import LOW_RANK, ROTATION, Kernel, did_you_mean, name_product
from peft_jax.core.validation import check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(AdapterMethod):
    """Low-rank and rotation branch on one kernel, y = ((x M) W) ⊙ scale + s ((x A) B - (x A₀) B₀).

    `peft_jax.optim.hybrid_mixing` weights the branches' updates layer by layer from their
    gradients. Trainable arrays: `low_rank` as in `LoRAGA`, `rotation` as in `BOFT` or `Unitary`.

    Attributes:
      rank, alpha, rank_stabilized, direction, init_scale, gamma: Settings of the low-rank branch.
      gradient_init: Whether the low-rank branch is initialized from the gradient (LoRA-GA) or as
        plain LoRA.
      block_size, n_butterfly_factors: Settings of the rotation branch.
      rotation: Kind of the rotation branch, "boft" or "unitary".
      unitary_modules: Names of modules that use the unitary map instead of BOFT, in the form of
        `target_modules`.
      dropout: Dropout probability of the low-rank branch's input.
      rotation_dropout: Dropout probability of the rotation's blocks.

    Source: Hybrid and Unitary PEFT for Resource-Efficient Large Language Models, arXiv 2507.18076.
    """

    name: ClassVar[str] = "hybrid"
    learning_rate: ClassVar[float] = 1e-4
    maps_input: ClassVar[bool] = True
    # Each branch has twice its learning rate as a separate method, because mixing about halves its
    # update. BOFT needs a higher learning rate than LoRA-GA.
    branches: ClassVar[Mapping[str, float]] = MappingProxyType({LOW_RANK: 1.0, ROTATION: 10.0})

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = True
    direction: str = "ArB2r"
    init_scale: str = "stable"
    gamma: float = 16.0
    gradient_init: bool = True
    block_size: int = 8
    n_butterfly_factors: int = 2
    rotation: str = "boft"
    unitary_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    rotation_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("rotation", self.rotation, ("boft", "unitary"))
        if isinstance(self.unitary_modules, str):
            raise ValueError(
                "unitary_modules must be a list of names, but is the string"
                f" {self.unitary_modules!r}"
            )
        object.__setattr__(self, "unitary_modules", tuple(self.unitary_modules))
        # Building both branches checks their settings.
        _ = (self.low_rank_method, self.rotation_method)

    @property
    def low_rank_method(self) -> LoRA:
        """Low-rank branch as a separate method."""
        common: dict[str, Any] = {
            "rank": self.rank,
            "alpha": self.alpha,
            "rank_stabilized": self.rank_stabilized,
            "dropout": self.dropout,
        }
        if not self.gradient_init:
            return LoRA(**common)
        return LoRAGA(
            **common, direction=self.direction, init_scale=self.init_scale, gamma=self.gamma
        )

    @property
    def rotation_method(self) -> BOFT | Unitary:
        """Rotation branch as a separate method."""
        if self.rotation == "unitary":
            return Unitary()
        return BOFT(
            block_size=self.block_size,
            n_butterfly_factors=self.n_butterfly_factors,
            dropout=self.rotation_dropout,
        )

    @property
    def gradient_rank(self) -> int:
        """Number of singular directions that the low-rank branch needs."""
        return self.low_rank_method.gradient_rank

    def for_module(self, module: str, *, rank: int | None, alpha: float | None) -> AdapterMethod:
        """Returns the method of one module; `unitary_modules` use the unitary map."""
        unitary = any(matches_name(name, module) for name in self.unitary_modules)
        method = dataclasses.replace(self, rotation="unitary") if unitary else self
        return AdapterMethod.for_module(method, module, rank=rank, alpha=alpha)

    def check_modules(self, modules: Collection[str]) -> None:
        """Raises ValueError unless each of `unitary_modules` names an adapted module."""
        for name in self.unitary_modules:
            if not any(matches_name(name, module) for module in modules):
                last_parts = {module.rsplit(".", 1)[-1] for module in modules}
                raise ValueError(
                    f"unitary_modules has {name!r}, which matches no adapted module"
                    f"{did_you_mean(name, last_parts)}"
                )

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError unless both branches can adapt the kernel."""
        self.low_rank_method.check_kernel(module, shape)
        self.rotation_method.check_kernel(module, shape)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Initializes each branch as a separate method."""
        low_key, rotation_key = jax.random.split(key)
        low, low_constant = self.low_rank_method.init(low_key, shape, gradient)
        rotation, rotation_constant = self.rotation_method.init(rotation_key, shape)
        return (
            {LOW_RANK: low, ROTATION: rotation},
            {LOW_RANK: low_constant, ROTATION: rotation_constant},
        )

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns the axes of each branch."""
        low, low_constant = self.low_rank_method.axes(d_in, d_out)
        rotation, rotation_constant = self.rotation_method.axes(d_in, d_out)
        return (
            {LOW_RANK: low, ROTATION: rotation},
            {LOW_RANK: low_constant, ROTATION: rotation_constant},
        )

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Prepares each branch as a separate method."""
        return {
            LOW_RANK: self.low_rank_method.prepare(
                trainable[LOW_RANK], constant.get(LOW_RANK, {}), dropout_key=dropout_key
            ),
            ROTATION: self.rotation_method.prepare(
                trainable[ROTATION], constant.get(ROTATION, {}), dropout_key=dropout_key
            ),
        }

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the axes of each branch."""
        low = self.low_rank_method.prepared_axes(d_in, d_out)
        rotation = self.rotation_method.prepared_axes(d_in, d_out)
        return None if low is None or rotation is None else {LOW_RANK: low, ROTATION: rotation}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns the rotated projection plus the low-rank term of the unrotated input."""
        low, rotation = arrays[LOW_RANK], arrays[ROTATION]
        if (
            "blocks" in rotation
            and self.low_rank_method.sums_kernels(dropout_key)
            and prefer_summed_kernel(x, base)
        ):
            return name_product(
                rotated_kernel_sum_product(
                    x, rotation["blocks"], base, rotation["scale"], low["a"], low["b"]
                )
            )
        rotated = self.rotation_method.project(x, base, rotation, dropout_key=dropout_key)
        return rotated + self.low_rank_method.low_rank(x, low, dropout_key=dropout_key)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns the rotated kernel plus the low-rank product."""
        rotated = self.rotation_method.merge(base, arrays[ROTATION])
        return rotated + self.low_rank_method.difference(arrays[LOW_RANK])
