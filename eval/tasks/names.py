"""Which tasks a name stands for."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from peft_jax.core import did_you_mean
from peft_jax.data.recipes.xnli import LANGUAGES

GLUE = (
    "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatch", "qnli", "rte", "wnli",
)  # fmt: skip
"""GLUE's tasks; all but STS-B by the names, prompts and metrics of the harness."""

XNLI = tuple(f"xnli_{language}" for language in LANGUAGES)
"""XNLI's languages, as the harness calls them."""

FLORES_LANGUAGES = (
    "fra_Latn", "deu_Latn", "spa_Latn", "zho_Hans", "arb_Arab", "hin_Deva", "swh_Latn",
)  # fmt: skip
"""The languages that `flores` translates from English and to it."""

FLORES = tuple(
    f"flores_{source}-{target}"
    for language in FLORES_LANGUAGES
    for source, target in (("eng_Latn", language), (language, "eng_Latn"))
)

SUITES: dict[str, tuple[str, ...]] = {"glue": GLUE, "xnli": XNLI, "flores": FLORES}
"""Names that stand for several tasks."""

HUMANEVAL, MT_BENCH = "humaneval", "mt_bench"

OURS = (*GLUE, "gsm8k", *XNLI, HUMANEVAL, MT_BENCH)
"""The tasks whose data can come from local files; and those of `flores`, of any two languages."""

_NAMED = re.compile(
    r"""^[ \t"']*(?:task|group|tag)["']?[ \t]*:(.*(?:\n(?:[ \t#-].*)?$)*)""", re.MULTILINE
)
"""A key of a YAML file that names, with the indented lines and list that belong to it."""

_NAME = re.compile(r"""\w[^\s"',\[\]#]*""")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One task to be evaluated.

    Attributes:
      name: its name.
      suite: the suite it was named by; "" if by its own name.
    """

    name: str
    suite: str = ""


def expand(names: Collection[str], known_to_harness: Collection[str]) -> list[Wanted]:
    """The tasks that names stand for, each once, in the order given.

    Args:
      names: of suites, of tasks of ours, or of tasks and groups of the harness.
      known_to_harness: the latter.

    Raises:
      ValueError: a name is not known; near matches are named.

    Example:
      >>> [wanted.name for wanted in expand(["gsm8k", "flores_deu_Latn-eng_Latn"], [])]
      ['gsm8k', 'flores_deu_Latn-eng_Latn']
    """
    found: dict[str, Wanted] = {}
    for name in names:
        members = SUITES.get(name)
        if members is None and not (name in OURS or is_flores(name) or name in known_to_harness):
            near = did_you_mean(name, [*SUITES, *OURS, *known_to_harness])
            near = near.partition(" Known:")[0].partition("; known:")[0]
            raise ValueError(
                f"there is no task {name!r}{near}; `--tasks=list` lists those of this project,"
                " and any task or group of lm-evaluation-harness goes by its name there"
            )
        for member in members or (name,):
            found.setdefault(member, Wanted(member, suite=name if members else ""))
    return list(found.values())


def is_flores(name: str) -> bool:
    """Whether a name is that of a direction: flores_eng_Latn-deu_Latn."""
    return name.startswith("flores_") and name.count("-") == 1


def names_in(folder: Path) -> set[str]:
    """Returns the words of a folder of the harness's configurations that can be a task's name.

    Every task, group and tag is among them, and some other words. Reading the configurations as
    `TaskManager` does takes ten times as long.

    Args:
      folder: Has the configurations, and what they include, at any depth.
    """
    found: set[str] = set()
    for file in folder.rglob("*"):
        # What others include has no ending.
        if file.suffix in ("", ".yaml", ".yml") and file.is_file():
            for named in _NAMED.findall(file.read_text(encoding="utf-8", errors="replace")):
                found.update(_NAME.findall(named))
    return found


def reads_local_data(name: str) -> bool:
    """Whether a task's data can come from local files."""
    return name in OURS or is_flores(name)


def flores_languages(name: str) -> tuple[str, str]:
    """The languages that a direction goes from and to.

    Raises:
      ValueError: one is missing, or they are the same.
    """
    source, _, target = name.removeprefix("flores_").partition("-")
    if not source or not target or source == target:
        raise ValueError(f"{name}: name two languages, as in flores_eng_Latn-deu_Latn")
    return source, target


def listing() -> str:
    """The project's tasks, to be read."""
    return "\n".join(
        [
            f"glue       {', '.join(GLUE)}",
            "gsm8k      strict and flexible extraction of the answer",
            f"xnli       {', '.join(XNLI)}",
            f"flores     {', '.join(FLORES)};",
            "           any other direction as flores_FROM-TO",
            "humaneval  pass@k; runs generated code (--allow_code_execution)",
            "mt_bench   80 questions of two turns, rated by a judge (--judge)",
            "and every task and group of lm-evaluation-harness, by its name there",
        ]
    )
