"""Runs `peft_jax.generation.command`."""

import sys

from peft_jax.generation.command import main

if __name__ == "__main__":
    sys.exit(main())
