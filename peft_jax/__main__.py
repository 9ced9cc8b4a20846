"""`python -m peft_jax`; see `peft_jax.commands.main`."""

import sys

from peft_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
