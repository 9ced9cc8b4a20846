"""Runs `python -m eval.study`; see `eval.study.command`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
