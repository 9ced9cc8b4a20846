r"""Runs a study, or resumes it, and writes its page.

    peft-jax study --config=study_cpu.py --workdir=runs/study_cpu

--config names a file with `get_config(data)`, which returns the settings of a
study. An arm is a method with its settings. A cell is one run: an arm on a
task, with a trial (a learning rate and a scale of the attention) and a seed.
The same command again runs the missing cells. Several commands may run at once
in one work directory.

Exit codes: 0 done, or the minutes are over; 1 failed; 2 rejected; 130 stopped
by Ctrl-C. docs/exit_codes.md has those of all commands.
"""

import argparse
import importlib.util
import logging
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_jax.commands.config_flags import explain_config_error, find_config_file
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

if TYPE_CHECKING:
    from .settings import StudySettings


@exits.command("eval.study", stopped="stopped; the same command resumes from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = make_parser().parse_args(argv)
    file = _check(given)
    # Hundreds of runs would repeat the same warnings.
    logging.getLogger().setLevel(logging.ERROR)
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    import jax

    from .page import write_page
    from .run import run_study
    from .store import SCRATCH, Store

    workdir = given.workdir or Path("runs") / file.stem
    # The cells of an arm share one program, which the first process compiles.
    jax.config.update("jax_compilation_cache_dir", str(workdir / SCRATCH / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    store = Store(workdir)
    study = load_study(file, given.data)
    if not given.page_only:
        until = time.time() + 60 * given.minutes
        run_study(study, store, only=given.only, until=until, say=_say)
    page = write_page(study, store, given.page or workdir / "page")
    _say(f"page: {page}")
    return exits.ExitCode.DONE


def make_parser() -> Arguments:
    """Returns the parser of the command's flags."""
    parser = Arguments("eval.study", description=__doc__)
    add = parser.add_argument
    add("--config", default="", metavar="FILE", help="file of the study, for example study_cpu.py")
    add("--workdir", type=Path, help="folder of cells/; by default runs/ and the file's name")
    add("--page", type=Path, help="folder of the page; by default page/ in the work directory")
    add(
        "--data",
        default="",
        metavar="PATH",
        help="folder of the data sets and models that the file names; by default they come from the"
        " Hugging Face hub",
    )
    add(
        "--only",
        default="",
        metavar="REGEX",
        help="run the cells whose TASK/ARM matches; TASK/facts and TASK/timing are names too",
    )
    add("--minutes", type=float, default=math.inf, help="start no cell after this many minutes")
    add("--page_only", action="store_true", help="write the page of the finished cells; run none")
    return parser


def _check(given: argparse.Namespace) -> Path:
    """Returns the study's file.

    Raises:
      ValueError: A flag has a value that cannot be used.
      RefusedError: There is no such file.
    """
    if not given.config:
        raise ValueError("--config is missing, for example --config=study_cpu.py; see --help")
    try:
        re.compile(given.only)
    except re.error as error:
        raise ValueError(
            f"--only is {given.only!r}, which is not a regular expression: {error}"
        ) from error
    if not given.minutes >= 0:
        raise ValueError(f"--minutes is {given.minutes} but must be at least 0")
    return find_config_file(given.config)


def load_study(file: Path, data: str = "") -> "StudySettings":
    """Loads a study from its file.

    Args:
      file: Python file with `get_config(data)`, which returns a mapping with the fields of
        `StudySettings`.
      data: Folder of data sets and models; empty: from the hub.

    Raises:
      ValueError: The file does not define a study.
    """
    from peft_jax.core.typed_settings import from_mapping

    from .settings import StudySettings

    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file; give one such as study_cpu.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # A configuration is a program and may raise anything.
        raise ValueError(explain_config_error(error, str(file))) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"{file} has no get_config(data) that returns the settings of a study;"
            " configs/study_cpu.py is one to copy"
        )
    try:
        study = module.get_config(data)
        if isinstance(study, Mapping):
            study = from_mapping(StudySettings, study)
    except Exception as error:
        raise ValueError(f"{file}: {explain_config_error(error, str(file))}") from error
    if not isinstance(study, StudySettings):
        raise ValueError(
            f"{file}: get_config returns {type(study).__name__} but must return the settings of a"
            " study"
        )
    return study


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
