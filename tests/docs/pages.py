"""Reads the code blocks of the documents, and runs them in a folder.

A block runs unless the line before it is a comment with the reason:

    <!-- not run: it needs a TPU pod -->

The commands of a block that does not run are still checked: their files, modules, flags, settings,
extras and targets must exist.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(path for path in ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("assets/*/*.md")),
]
RUN = ("python", "bash")
SHOWN = ("text", "yaml", "json", "toml")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")

STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": ROOT / "assets" / "tiny_world"}
"""Local checkpoints that replace those of the Hugging Face hub, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Fenced block of a document.

    Attributes:
      language: Language after the fence.
      text: Content, without the indentation of its fence.
      line: Line number of the fence.
      reason: Reason not to run it; empty if it runs.
    """

    language: str
    text: str
    line: int
    reason: str = ""


def read_blocks(path: Path) -> list[Block]:
    """Returns the fenced blocks of a document in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks, index = [], 0
    while index < len(lines):
        fence = re.match(r"( *)```(\S*)$", lines[index])
        index += 1
        if fence is None:
            continue
        first = index
        while lines[index].strip() != "```":
            index += 1
        marker = NOT_RUN.fullmatch(lines[first - 2].strip()) if first > 1 else None
        blocks.append(
            Block(
                language=fence[2],
                text="\n".join(line[len(fence[1]) :] for line in lines[first:index]) + "\n",
                line=first,
                reason=marker[1] if marker else "",
            )
        )
        index += 1
    return blocks


def indented_blocks(path: Path) -> list[int]:
    """Returns the line numbers at which indented blocks, without a fence, begin."""
    found, fenced, item = [], False, False
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith("    ") and not lines[number - 2].strip() and not item:
            found.append(number)
        elif line and not line.startswith(" "):
            item = bool(re.match(r"([-*]|\d+\.|!!!|\?\?\?|===) ", line))
    return found


def headless_tables(text: str) -> list[int]:
    """Returns the line numbers at which tables begin that have no header and separator.

    Such rows render as text. The separator must have as many columns as the header.
    """
    found, fenced, first = [], False, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        if fenced or not line.strip().startswith("|"):
            first = 0
        elif not first:
            first = number
            below = lines[number].strip() if number < len(lines) else ""
            is_separator = re.fullmatch(r"\|( *:?-+:? *\|)+", below)
            if not is_separator or _columns(below) != _columns(line):
                found.append(number)
    return found


def _columns(row: str) -> int:
    """Returns the number of cells of a table's row."""
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def make_folder(folder: Path) -> dict[str, str]:
    """Fills a folder like a copy of the repository, and returns its environment variables.

    Args:
      folder: Empty folder.
    """
    for name in ("assets", "benchmarks", "configs", "examples", "eval", "tests", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    commands = folder / ".commands"
    commands.mkdir()
    python = commands / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    script = commands / "peft-jax"
    script.write_text('#!/bin/sh\nexec python -m peft_jax "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    hub = folder / ".hub"
    for name, checkpoint in STAND_INS.items():
        _put_in_cache(hub / "hub" / f"models--{name.replace('/', '--')}", checkpoint)
    # One device, because the eight of other tests would slow down every page.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return inherited | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }


def _put_in_cache(place: Path, checkpoint: Path) -> None:
    """Copies a checkpoint to the cache of huggingface_hub."""
    commit = "0" * 40
    shutil.copytree(checkpoint, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit, encoding="utf-8")


_DRIVER = """
import json, subprocess, sys
scope = {"__name__": "__main__"}
for language, text, where in json.loads(sys.stdin.read()):
    print(f"[{where}]", flush=True)
    if language == "python":
        exec(compile(text, where, "exec"), scope)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
"""


def run_blocks(path: Path, folder: Path, env: dict[str, str]) -> str:
    """Runs the blocks of a document in order, and returns their output.

    Python blocks share their names, as in a notebook.

    Args:
      path: Document.
      folder: Working directory of the blocks.
      env: Environment variables.

    Raises:
      AssertionError: A block ends with an error.
    """
    blocks = [
        (block.language, block.text, f"{path.relative_to(ROOT)}:{block.line}")
        for block in read_blocks(path)
        if block.language in RUN and not block.reason
    ]
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        cwd=folder,
        env=env,
        input=json.dumps(blocks),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def commands_in(text: str) -> Iterator[list[str]]:
    """Yields the words of each simple command of a shell script, without environment variables.

    The script of another command's `--command=` is included.
    """
    without_comments = re.sub(r"(?m)(^|\s)# .*$", "", re.sub(r"\\\n\s*", " ", text))
    lexer = shlex.shlex(without_comments, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(";&|\n"):
            while words and re.match(r"[A-Za-z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words
            words = []
            continue
        words.append(word)
        if word.startswith("--command="):
            yield from commands_in(word.partition("=")[2])


def find_unknown(words: list[str]) -> str:
    """Returns what a command names that does not exist; empty if everything exists.

    Args:
      words: Words of the command.
    """
    program, *rest = words
    if program == "peft-jax":
        program, rest = "python", ["-m", "peft_jax", *rest]
    if Path(program).name == "python" and rest[:2] == ["-m", "pip"]:
        program, rest = "pip", rest[2:]
    if Path(program).name in ("pip", "pip3"):
        return _unknown_extras(rest)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return next((f"no target {w}" for w in rest if "=" not in w and w not in targets), "")
    if Path(program).name not in ("python", "python3"):
        return ""
    if rest[:1] == ["-m"] and rest[1] == "pytest":
        paths = [word for word in rest if word.startswith(("tests/", "docs/"))]
        return next((f"no path {one}" for one in paths if not (ROOT / one).exists()), "")
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    own = [flag for flag in flags if not flag.startswith("--config.")]
    if rest[:1] == ["-m"]:
        if importlib.util.find_spec(rest[1]) is None:
            return f"no module {rest[1]}"
    elif rest and not (ROOT / rest[0]).is_file():
        return f"no file {rest[0]}"
    start = (3 if rest[1] == "peft_jax" else 2) if rest[0] == "-m" else 1
    known = known_flags(*rest[:start]) if own else set()
    return next((f"no flag {flag}" for flag in own if flag not in known), "")


def _unknown_extras(words: list[str]) -> str:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name for word in words for name in re.findall(r"\[([\w,]+)\]", word)}
    known = set(setup["options.extras_require"])
    return next(
        (f"no extra {one}" for names in extras for one in names.split(",") if one not in known), ""
    )


@functools.cache
def known_flags(*start: str) -> set[str]:
    """Returns the flags in a program's help.

    Args:
      *start: Arguments of Python: a file, or "-m" and a module, with a command of `peft-jax`.
    """
    done = subprocess.run(
        [sys.executable, *start, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    return set(re.findall(r"--[\w-]+", done.stdout))
