"""Defines a method of a user's own, which the tests register or import."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from peft_jax.adapters import AdapterMethod
from peft_jax.core import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(AdapterMethod):
    """Scales outputs: y = (x W) ⊙ (1 + strength · s)."""

    name: ClassVar[str] = "scaled"
    learning_rate: ClassVar[float] = 3e-3

    strength: float = 1.0

    def init(self, key, shape, gradient=None):
        return {"s": jnp.zeros(shape[1], jnp.float32)}, {}

    def axes(self, d_in, d_out):
        return {"s": (d_out,)}, {}

    def prepare(self, trainable, constant, *, dropout_key=None):
        return {"scale": 1.0 + self.strength * trainable["s"]}

    def project(self, x, base, arrays, *, dropout_key=None):
        return linear(x, base) * arrays["scale"].astype(x.dtype)

    def merge(self, base, arrays):
        return base.astype(jnp.float32) * arrays["scale"]
