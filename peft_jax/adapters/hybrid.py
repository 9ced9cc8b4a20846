"""The hybrid: a low-rank branch that starts along the gradient, and a rotation, on one kernel."""

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
from peft_jax.adapters.unitary import Unitary
from peft_jax.core import Kernel, did_you_mean
from peft_jax.core.validation import check_choice

LOW_RANK = "low_rank"
"""The branch of LoRA-GA, as a key in the adapter's trees."""
ROTATION = "rotation"
"""The branch of BOFT, or of the unitary map in its place, as a key in the adapter's trees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(AdapterMethod):
    """Both branches on one kernel, y = ((x M) W) ⊙ scale + s ((x A) B - (x A₀) B₀).

    How far each branch moves in a step is the business of `peft_jax.optim.hybrid_mixing`, which
    weighs their updates layer by layer by their gradients. Trained: `low_rank` as in `LoRAGA`,
    `rotation` as in `BOFT` or `Unitary`.

    Attributes:
      rank, alpha, rank_stabilized, direction, init_scale, gamma: of the low-rank branch.
      gradient_init: whether that branch starts along the gradient (LoRA-GA); else it is plain LoRA.
      block_size, n_butterfly_factors: of the rotation.
      rotation: "boft" or "unitary".
      unitary_modules: modules that take the unitary map in BOFT's place, by name as
        `target_modules` are given.
      dropout: of the low-rank branch's input.
      rotation_dropout: of the rotation's blocks.

    Source: Hybrid and Unitary PEFT for Resource-Efficient Large Language Models, arXiv 2507.18076.
    """

    name: ClassVar[str] = "hybrid"
    learning_rate: ClassVar[float] = 1e-4
    # Each branch begins with twice the rate that it has as a method of its own, for it takes about
    # half of its update; and BOFT wants longer steps than LoRA-GA.
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
        """The low-rank branch as a method of its own."""
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
        """The rotation branch as a method of its own."""
        if self.rotation == "unitary":
            return Unitary()
        return BOFT(
            block_size=self.block_size,
            n_butterfly_factors=self.n_butterfly_factors,
            dropout=self.rotation_dropout,
        )

    @property
    def gradient_rank(self) -> int:
        """What the low-rank branch needs."""
        return self.low_rank_method.gradient_rank

    def for_module(self, module: str, *, rank: int | None, alpha: float | None) -> AdapterMethod:
        """With the unitary map where the module is one of `unitary_modules`."""
        turned = any(matches_name(name, module) for name in self.unitary_modules)
        method = dataclasses.replace(self, rotation="unitary") if turned else self
        return AdapterMethod.for_module(method, module, rank=rank, alpha=alpha)

    def check_modules(self, modules: Collection[str]) -> None:
        """Each of `unitary_modules` must name an adapted module."""
        for name in self.unitary_modules:
            if not any(matches_name(name, module) for module in modules):
                last_parts = {module.rsplit(".", 1)[-1] for module in modules}
                raise ValueError(
                    f"unitary_modules names {name!r}, which matches none of the adapted modules"
                    f"{did_you_mean(name, last_parts)}"
                )

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Both branches must be able to adapt it."""
        self.low_rank_method.check_kernel(module, shape)
        self.rotation_method.check_kernel(module, shape)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Both branches at their own starts."""
        low_key, rotation_key = jax.random.split(key)
        low, low_constant = self.low_rank_method.init(low_key, shape, gradient)
        rotation, rotation_constant = self.rotation_method.init(rotation_key, shape)
        return (
            {LOW_RANK: low, ROTATION: rotation},
            {LOW_RANK: low_constant, ROTATION: rotation_constant},
        )

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Each branch as on its own."""
        low, low_constant = self.low_rank_method.axes(d_in, d_out)
        rotation, rotation_constant = self.rotation_method.axes(d_in, d_out)
        return (
            {LOW_RANK: low, ROTATION: rotation},
            {LOW_RANK: low_constant, ROTATION: rotation_constant},
        )

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Each branch as on its own."""
        return {
            LOW_RANK: self.low_rank_method.prepare(
                trainable[LOW_RANK], constant.get(LOW_RANK, {}), dropout_key=dropout_key
            ),
            ROTATION: self.rotation_method.prepare(
                trainable[ROTATION], constant.get(ROTATION, {}), dropout_key=dropout_key
            ),
        }

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """The rotated projection plus the low-rank term of the unrotated input."""
        rotated = self.rotation_method.project(x, base, arrays[ROTATION], dropout_key=dropout_key)
        return rotated + self.low_rank_method.low_rank(x, arrays[LOW_RANK], dropout_key=dropout_key)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """The rotated kernel plus the low-rank product."""
        rotated = self.rotation_method.merge(base, arrays[ROTATION])
        return rotated + self.low_rank_method.difference(arrays[LOW_RANK])
