"""`python train.py --config=configs/finetune.py:hybrid`; see `peft_jax.commands.train`."""

import sys

from peft_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
