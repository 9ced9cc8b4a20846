r"""Runs a study, or goes on with it, and writes its page.

    python -m eval.study --config=configs/study_cpu.py --workdir=runs/study_cpu

--config names a file with `get_config`, which returns a `StudySettings`. --data is a
folder with the data sets and models that the configuration names; without it they come from the
Hugging Face hub. --page is the folder the
page goes to; by default `page/` in the work directory. --only=REGEX takes the cells whose
"task/arm" matches. --minutes=N begins no cell after N minutes. --page_only runs nothing.

The same command again runs what is missing. Several may run at once in one work directory.

Exit codes: 0 all asked for is done, or the minutes are over; 1 failed; 2 refused; 130 stopped by
Ctrl-C. docs/exit_codes.md says more.
"""

import importlib.util
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from peft_jax.training import config_flags

_CONFIG = flags.DEFINE_string("config", None, "A study's file: configs/study_cpu.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where cells are; by default runs/ and its name.")
_PAGE = flags.DEFINE_string("page", None, "The folder of the page; by default WORKDIR/page.")
_DATA = flags.DEFINE_string("data", "", "A folder with data and models; empty: from the hub.")
_ONLY = flags.DEFINE_string("only", "", "A regular expression for TASK/ARM.")
_MINUTES = flags.DEFINE_float("minutes", math.inf, "Begin no cell after so many minutes.")
_PAGE_ONLY = flags.DEFINE_bool("page_only", False, "Write the page of what is there.")

config_flags.define_traceback()


def main(argv: Sequence[str]) -> None:
    """Does what the flags say."""
    if len(argv) > 1:
        config_flags.refuse(f"{argv[1]!r} is not a flag; flags begin with two dashes")
    if _CONFIG.value is None or not Path(_CONFIG.value).is_file():
        config_flags.refuse(
            f"--config must be a file such as configs/study_cpu.py; it is {_CONFIG.value!r}"
        )
    try:
        re.compile(_ONLY.value)
    except re.error as error:
        config_flags.refuse(f"--only is {_ONLY.value!r}, no regular expression: {error}")
    if not _MINUTES.value >= 0:
        config_flags.refuse(f"--minutes is {_MINUTES.value}; it must be 0 or more")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    # Imported here, so that a mistyped flag is refused at once and not after JAX has started.
    import jax

    from .page import write_page
    from .run import run_study
    from .store import Store

    file = Path(str(_CONFIG.value))
    workdir = Path(_WORKDIR.value or Path("runs") / file.stem)
    # Cells of one arm are one program: it is compiled once, in whichever process comes first.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    store = Store(workdir)
    study = _load(file)
    if not _PAGE_ONLY.value:
        until = time.time() + 60 * _MINUTES.value
        run_study(study, store, only=_ONLY.value, until=until, say=_say)
    page = write_page(study, store, Path(_PAGE.value or workdir / "page"))
    _say(f"page: {page}")


def _load(file: Path):
    """What the file's `get_config` returns."""
    from .settings import StudySettings

    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # A configuration is a program and may raise anything.
        raise ValueError(config_flags.explain_config_error(error)) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"{file} has no get_config(data) that returns a StudySettings; configs/study_cpu.py is"
            " one to copy"
        )
    try:
        study = module.get_config(_DATA.value)
    except Exception as error:
        raise ValueError(f"{file}: {config_flags.explain_config_error(error)}") from error
    if not isinstance(study, StudySettings):
        raise ValueError(f"{file}: get_config must return a StudySettings")
    return study


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    config_flags.run("eval.study", main)
