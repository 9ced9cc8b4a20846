"""Implements (IA)³: trainable factors on a kernel's outputs, or on its inputs."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.names import matches_name
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.core import Kernel, did_you_mean, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(AdapterMethod):
    """Rescaled activations, y = (x W) ⊙ l; y = (x ⊙ l) W in `feedforward_modules`.

    Trainable array: `l` [d_out] or [d_in], initially one.

    Attributes:
      feedforward_modules: Names of modules whose inputs are scaled instead of their outputs, in the
        form of `target_modules`.
      scales_input: Whether this kernel's inputs are scaled; set for each module from
        `feedforward_modules`.

    Source: Liu et al., 2022, arXiv 2205.05638, section 3.3. The paper scales keys, values and the
    inputs of the second linear map of the feed-forward part: `target_modules` and
    `feedforward_modules` choose them.
    """

    name: ClassVar[str] = "ia3"
    learning_rate: ClassVar[float] = 3e-3
    no_decay: ClassVar[tuple[str, ...]] = ("l",)

    feedforward_modules: tuple[str, ...] = ()
    scales_input: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, str):
            raise ValueError(
                "feedforward_modules must be a list of names, but is the string"
                f" {self.feedforward_modules!r}"
            )
        object.__setattr__(self, "feedforward_modules", tuple(self.feedforward_modules))

    def for_module(self, module: str, *, rank: int | None, alpha: float | None) -> "IA3":
        """Returns the method of one module; `feedforward_modules` scale their inputs."""
        chosen = any(matches_name(name, module) for name in self.feedforward_modules)
        method = dataclasses.replace(self, scales_input=self.scales_input or chosen)
        AdapterMethod.for_module(method, module, rank=rank, alpha=alpha)
        return method

    def check_modules(self, modules: Collection[str]) -> None:
        """Raises ValueError unless each of `feedforward_modules` names an adapted module."""
        for name in self.feedforward_modules:
            if not any(matches_name(name, module) for module in modules):
                last_parts = {module.rsplit(".", 1)[-1] for module in modules}
                raise ValueError(
                    f"feedforward_modules has {name!r}, which matches no adapted module"
                    f"{did_you_mean(name, last_parts)}"
                )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns factors of one."""
        del key, gradient
        d_in, d_out = shape
        return {"l": jnp.ones((d_in if self.scales_input else d_out,), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns the axis of the scaled features."""
        return {"l": (d_in if self.scales_input else d_out,)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the factors."""
        del constant, dropout_key
        return {"l": trainable["l"]}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the axis of the scaled features."""
        return self.axes(d_in, d_out)[0]

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x W) ⊙ l, or (x ⊙ l) W."""
        del dropout_key
        factors = arrays["l"].astype(x.dtype)
        return linear(x * factors, base) if self.scales_input else linear(x, base) * factors

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W with scaled columns, or scaled rows."""
        factors = arrays["l"].astype(jnp.float32)
        return base.astype(jnp.float32) * (factors[:, None] if self.scales_input else factors)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of (IA)³."""
        return (IA3Form,)


@dataclasses.dataclass(frozen=True)
class IA3Form(PeftForm):
    """`ia3_l` is [d_out, 1], or [1, d_in] in feed-forward modules.

    PEFT's layer also scales the base's bias where it scales outputs.
    """

    method: IA3
    peft_type = "IA3"
    names = ("ia3_l",)
    exact = True
    understood = PeftSettings(
        # Which modules scale their inputs is read from the tensors' shapes.
        irrelevant=frozenset({"feedforward_modules", "init_ia3_weights"}),
        compared=("feedforward_modules",),
    )
    module_lists: ClassVar[Mapping[str, str]] = {"feedforward_modules": "scales_input"}

    @property
    def scales_bias(self) -> bool:
        """Whether PEFT's layer scales the base's bias: where it scales outputs."""
        return not self.method.scales_input

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> IA3:
        """Returns (IA)³ with the feed-forward modules that the shapes show."""
        del config
        return IA3(
            feedforward_modules=tuple(
                sorted(name for name, shapes in modules.items() if shapes["ia3_l"][0] == 1)
            )
        )

    def settings(self) -> dict[str, Any]:
        """Returns no settings, beside the lists of modules."""
        return {}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [1, d_in] or [d_out, 1]."""
        return {"ia3_l": (1, d_in) if self.method.scales_input else (d_out, 1)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds an axis of length one."""
        return {"ia3_l": arrays["l"][None] if self.method.scales_input else arrays["l"][:, None]}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Drops the axis of length one."""
        return {"l": tensors["ia3_l"].reshape(-1)}, {}
