"""Parameter-efficient fine-tuning of large language models in JAX and Flax."""

from peft_jax.version import __version__

__all__ = ["__version__"]
