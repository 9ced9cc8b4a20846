"""`python -m peft_jax.plan`; see `peft_jax.commands.plan`."""

import sys

from peft_jax.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
