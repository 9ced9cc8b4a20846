"""Tests that a command ends with one message and the documented exit code."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from examples import tiny_world
from peft_jax.runtime import exits
from peft_jax.runtime.errors import ExitCode
from peft_jax.runtime.flags import Arguments
from peft_jax.training import RefusedError
from peft_jax.training.config import from_config_dict

ROOT = Path(__file__).parents[2]


def ended(capsys, action, *args):
    """Returns the exit code and the message of a command that runs `action`."""
    code = exits.command("measure")(action)(*args)
    return code, capsys.readouterr().err


def raising(error):
    def action(*_):
        raise error

    return action


def _out_of_memory():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n1\n2")


def _of_tensorstore(number):
    return ValueError(f"OUT_OF_RANGE: Failed writing: \"/run/a\": No [os_error_code='{number}']")


def _os_error(number, *files):
    return OSError(number, os.strerror(number), *files)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RefusedError("rank is 0; it must be positive"), 2, "rank is 0; it must be positive"),
        (ValueError("top_p is 2; it must be at most 1"), 2, "top_p is 2; it must be at most 1"),
        (FloatingPointError("B holds NaN"), 2, "B holds NaN"),
        (_os_error(errno.ENOENT, "rows"), 2, "rows: no such file or directory; "),
        (_os_error(errno.EACCES, "run"), 2, "run: permission denied; "),
        (_os_error(errno.EROFS, "run"), 2, "run: read-only file system; "),
        (_os_error(errno.ENOSPC, "run/a"), 1, "run/a: no space left on device; "),
        (_os_error(errno.ENOSPC), 1, "no space left on device; "),
        (_os_error(errno.EFBIG), 1, "file too large; "),
        (_os_error(errno.EIO, "run/a"), 1, "run/a: "),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "connection reset by peer"),
        (OSError("the hub has no such model"), 2, "the hub has no such model"),
        (MemoryError(), 1, "out of host memory"),
        (_out_of_memory(), 1, "out of device memory (RESOURCE_EXHAUSTED: "),
        (_of_tensorstore(errno.EFBIG), 1, "/run/a: file too large; "),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_ends_a_command_with_one_line(capsys, error, code, message):
    found, said = ended(capsys, as_ours(raising(error)))
    assert found == code
    assert said.startswith(f"measure: {message}")
    assert said.count("\n") == 1


def as_if_of(module, action):
    """Returns the same function, as if `module` defined it."""
    names = {**action.__globals__, "__name__": module}
    return type(action)(action.__code__, names, closure=action.__closure__)


def as_ours(action):
    """Returns the same function, as if a module of the project defined it."""
    return as_if_of("peft_jax.runtime.files", action)


def test_missing_jax_platform_is_named(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def action():
        assert sys is None

    code, said = ended(capsys, as_if_of("jax._src.xla_bridge", action))
    assert code == ExitCode.REFUSED
    assert "JAX_PLATFORMS=cuda" in said
    with pytest.raises(AssertionError):
        exits.command("measure")(as_ours(action))()


@pytest.mark.parametrize(
    "action",
    [
        lambda: np.zeros((2, 3)) @ np.zeros((2, 3)),
        lambda: int("nine"),
        lambda: {}["rank"],
        lambda: None + 1,
        lambda: (_ for _ in ()).throw(RuntimeError("a bug")),
        lambda: "\ud800".encode(),
    ],
)
def test_bug_keeps_its_traceback(action):
    with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)):
        exits.command("measure")(action)()


def test_value_error_of_a_library_keeps_its_traceback():
    def action():
        jax.numpy.zeros((2, 3)).reshape(7)

    with pytest.raises((ValueError, TypeError)):
        exits.command("measure")(as_ours(action))()


def test_traceback_flag_prints_the_traceback(capsys):
    code, said = ended(
        capsys, lambda argv: from_config_dict(ConfigDict({"trian": {}})), ["--traceback"]
    )
    assert code == ExitCode.REFUSED
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("measure: trian ")


def test_control_characters_of_a_message_are_escaped(capsys):
    code, said = ended(capsys, raising(RefusedError("no file '\x1b]0;gone\x07\x9b2J'")))
    assert code == ExitCode.REFUSED
    assert said == "measure: no file '\\x1b]0;gone\\x07\\x9b2J'\n"


def test_length_of_a_message_is_bounded(capsys):
    _, said = ended(capsys, raising(RefusedError(f"it is {'9' * 10**6}")))
    assert len(said) < 5000


def test_command_returns_its_exit_code(capsys):
    assert ended(capsys, lambda: None) == (0, "")
    assert ended(capsys, lambda: ExitCode.DOES_NOT_FIT) == (4, "")
    with pytest.raises(SystemExit):
        exits.command("measure")(lambda: sys.exit(3))()


PROGRAM = """
import sys
from examples import tiny_world
from peft_jax.runtime import exits

@exits.command("count")
def main():
    for number in range(100_000):
        print(number, "\\u4e00")

sys.exit(main())
"""


def test_closed_output_pipe_ends_a_command_silently():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == ExitCode.NO_READER
    process.stderr.close()


def test_text_outside_the_terminals_encoding_is_escaped():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("100_000", "1")],
        capture_output=True,
        env={"PYTHONIOENCODING": "latin-1", "PATH": ""},
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == b"0 \\u4e00\n"


def test_unknown_flag_is_rejected_in_one_line_with_the_nearest(capsys):
    parser = Arguments("measure", description=None)
    parser.add_argument("--max_length", type=int)
    for given, message in (
        (["--maxlength=3"], "there is no flag --maxlength; did you mean --max_length?"),
        (["--max_length=x"], "argument --max_length: invalid int value: 'x'"),
    ):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(given)
        assert left.value.code == ExitCode.REFUSED
        assert capsys.readouterr().err == f"measure: {message}; see --help\n"


def test_every_program_is_a_command():
    """Every file that a user can start uses `command`; worker programs are excluded."""
    found = {}
    folders = ("configs", "eval", "examples", "kernels_pallas", "peft_jax")
    paths = [
        *ROOT.glob("*.py"),
        *(path for name in folders for path in (ROOT / name).rglob("*.py")),
    ]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        program = re.search(r'^if __name__ == "__main__":', text, re.M)
        is_worker = path.stem.endswith("worker")
        if is_worker or name == "eval/sandbox/jail.py" or not program:
            continue
        source = re.search(r"^from ([\w.]+) import main$", text, re.M)
        if source:
            module = source[1]
            base = path.parent if module.startswith(".") else ROOT
            text = (base / module.strip(".").replace(".", "/")).with_suffix(".py").read_text()
        found[name] = "@exits.command(" in text
    assert not [name for name, is_command in found.items() if not is_command]
    assert len(found) > 6


def test_documentation_lists_every_exit_code():
    page = (ROOT / "docs" / "exit_codes.md").read_text(encoding="utf-8")
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)]
    assert listed == [int(code) for code in ExitCode]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["stories", "--rows=0"], "--rows "),
        (["tokenizer", "--vocabulary=2"], "--vocabulary "),
        (["novels"], "argument what: invalid choice: 'novels'"),
        (["stories", "--out=/dev/null/x"], "/dev/null: "),
    ],
)
def test_examples_reject_flags_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    out = [] if any("--out" in flag for flag in flags) else [f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["tiny_world.py", *flags, *out])
    try:
        code = tiny_world.main()
    except SystemExit as left:
        code = left.code
    assert code == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert said.startswith(f"examples.tiny_world: {message}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
