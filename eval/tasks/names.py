"""Resolves names to tasks."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from peft_jax.core import did_you_mean
from peft_jax.data.recipes.xnli import LANGUAGES

GLUE = (
    "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatch", "qnli", "rte", "wnli",
)  # fmt: skip
"""Tasks of GLUE, with the harness's names, prompts and metrics except for STS-B."""

XNLI = tuple(f"xnli_{language}" for language in LANGUAGES)
"""Tasks of XNLI, one per language, with the harness's names."""

FLORES_LANGUAGES = (
    "fra_Latn", "deu_Latn", "spa_Latn", "zho_Hans", "arb_Arab", "hin_Deva", "swh_Latn",
)  # fmt: skip
"""Languages that `flores` translates from and into English."""

FLORES = tuple(
    f"flores_{source}-{target}"
    for language in FLORES_LANGUAGES
    for source, target in (("eng_Latn", language), (language, "eng_Latn"))
)

SUITES: dict[str, tuple[str, ...]] = {"glue": GLUE, "xnli": XNLI, "flores": FLORES}
"""Suites of tasks, by name."""

HUMANEVAL, MT_BENCH = "humaneval", "mt_bench"

OURS = (*GLUE, "gsm8k", *XNLI, HUMANEVAL, MT_BENCH)
"""Tasks that can read local files, besides FLORES in any direction."""

_NAMED = re.compile(
    r"""^[ \t"']*(?:task|group|tag)["']?[ \t]*:(.*(?:\n(?:[ \t#-].*)?$)*)""", re.MULTILINE
)
"""Matches the value of a YAML key that may name a task, with its indented lines."""

_NAME = re.compile(r"""\w[^\s"',\[\]#]*""")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Task to evaluate.

    Attributes:
      name: Name of the task.
      suite: Suite that included the task; "" if it was named itself.
    """

    name: str
    suite: str = ""


def expand(names: Collection[str], known_to_harness: Collection[str]) -> list[Wanted]:
    """Returns the tasks of the given names, without duplicates and in order.

    Args:
      names: Names of suites, of this project's tasks, or of the harness's tasks and groups.
      known_to_harness: Names of the harness's tasks and groups.

    Raises:
      ValueError: A name is unknown; the message suggests similar ones.

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
                f"there is no task {name!r}{near}; --tasks=list lists those of this project, and"
                " the names of lm-evaluation-harness's tasks and groups are accepted too"
            )
        for member in members or (name,):
            found.setdefault(member, Wanted(member, suite=name if members else ""))
    return list(found.values())


def is_flores(name: str) -> bool:
    """Returns whether a name is a translation direction, as in flores_eng_Latn-deu_Latn."""
    return name.startswith("flores_") and name.count("-") == 1


def names_in(folder: Path) -> set[str]:
    """Returns words in the harness's configurations that may be names of tasks.

    They include every task, group and tag, and some other words. Reading the configurations as
    `TaskManager` does takes ten times as long.

    Args:
      folder: Folder of the configurations and of the files that they include.
    """
    found: set[str] = set()
    for file in folder.rglob("*"):
        # Included files have no suffix.
        if file.suffix in ("", ".yaml", ".yml") and file.is_file():
            for named in _NAMED.findall(file.read_text(encoding="utf-8", errors="replace")):
                found.update(_NAME.findall(named))
    return found


def reads_local_data(name: str) -> bool:
    """Returns whether a task can read local files."""
    return name in OURS or is_flores(name)


def flores_languages(name: str) -> tuple[str, str]:
    """Returns the source and target language of a translation direction.

    Raises:
      ValueError: A language is missing, or they are the same.
    """
    source, _, target = name.removeprefix("flores_").partition("-")
    if not source or not target or source == target:
        raise ValueError(
            f"{name} does not name two languages; give a direction such as flores_eng_Latn-deu_Latn"
        )
    return source, target


def listing() -> str:
    """Returns the list of this project's tasks for `--tasks=list`."""
    return "\n".join(
        [
            f"glue       {', '.join(GLUE)}",
            "gsm8k      strict and flexible extraction of the answer",
            f"xnli       {', '.join(XNLI)}",
            f"flores     {', '.join(FLORES)};",
            "           other directions as flores_FROM-TO",
            "humaneval  pass@k; runs generated code (--allow_code_execution)",
            "mt_bench   80 two-turn questions, rated by a judge (--judge)",
            "and every task and group of lm-evaluation-harness, by its name there",
        ]
    )
