"""Kills runs at random and fills their disks, and compares them with an uninterrupted run.

    python -m benchmarks.reliability --kills=20 --full_disks=5

Fine-tunes the small checkpoint in assets/ for a few steps, each run as processes of `train.py`. A
run is killed (SIGKILL) one to three times: while it starts, between steps, while a checkpoint is
written, while its results are exported. Then the same command runs to its end. A full disk is a
tmpfs that is smaller than the run, where this user may mount one; elsewhere a limit of the size of
files (as of `ulimit -f`). The run must end with one line and exit code 1, and the same command must
finish it once there is room.

Every run must equal the uninterrupted one: the adapter's files bit for bit, the losses and totals
of summary.json, and all records of metrics.jsonl except timings. The exit code is 1 if one does
not. --seed determines the moments; what a process does then depends on the machine.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

ROOT = Path(__file__).resolve().parents[1]

STEPS = 16
PAGE = 4096
"""Allocation unit of a tmpfs, in bytes."""

ROOM = 64 * 2**20
"""Size of a disk after it has been enlarged, in bytes."""

LONGEST = 900
"""Time limit of a process, in seconds."""

COMPARED = ("loss_before", "loss_after", "before", "after", "train_loss", "steps", "tokens", "data")
"""Keys of summary.json that do not depend on the clock."""

_UNFINISHED = re.compile(r"(\d+)\.\S*tmp")


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one run.

    Attributes:
      happened: Where each of its processes was stopped.
      fault: How the run differs from the uninterrupted one; empty if it is equal.
    """

    happened: tuple[str, ...]
    fault: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run, read from its work directory.

    Attributes:
      step: Last step in metrics.jsonl; 0 before the first.
      unfinished: Steps of checkpoints that are being written.
      exporting: Whether results are being written.
    """

    step: int
    unfinished: frozenset[int]
    exporting: bool

    @staticmethod
    def of(workdir: Path) -> "Progress":
        """Reads the progress of a work directory in any state."""
        steps = [record["step"] for record in read_records(workdir) if record["split"] == "train"]
        checkpoints = workdir / "checkpoints"
        names = os.listdir(checkpoints) if checkpoints.is_dir() else []
        unfinished = frozenset(int(m[1]) for name in names if (m := _UNFINISHED.match(name)))
        exporting = workdir.is_dir() and any("adapter" in name for name in os.listdir(workdir))
        return Progress(max(steps, default=0), unfinished, exporting)

    def describe(self, before: "Progress") -> str:
        """Returns where a process was stopped, as text.

        Args:
          before: Progress before the process was started.

        Example:
          >>> new = Progress(0, frozenset(), False)
          >>> Progress(7, frozenset({6}), False).describe(new)
          'step 7, writing checkpoint 6'
          >>> new.describe(new)
          'start-up'
        """
        if self.exporting:
            return "start-up or second export" if before.exporting else "export"
        writing = sorted(self.unfinished - before.unfinished)
        if self.step == before.step and not writing:
            return "start-up"
        return f"step {self.step}" + (f", writing checkpoint {writing[-1]}" if writing else "")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Folder and command of all runs.

    Attributes:
      folder: Folder of work directories and of compiled programs.
      command: Command of a run, without the work directory.
    """

    folder: Path
    command: tuple[str, ...]

    @staticmethod
    def make(folder: Path, method: str) -> "Bench":
        """Writes a few rows of data, so that runs start within seconds."""
        rows = folder / "rows"
        rows.mkdir()
        for split, count in (("train", 64), ("validation", 16)):
            file = Path("assets", "tiny_world_questions", f"{split}.jsonl")
            lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[:count]
            (rows / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {
            "data.path": rows,
            "method.dropout": 0.1,
            "train.batch_size": 4,
            "train.max_length": 96,
            "checkpoint.every": 2,
            "evaluate.every": 6,
        }
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        config = f"--config=configs/demo.py:{method},steps={STEPS}"
        return Bench(folder, (sys.executable, str(ROOT / "train.py"), config, *flags))

    def start(self, workdir: Path, *, most_bytes: int | None = None) -> subprocess.Popen[str]:
        """Starts a run.

        Args:
          workdir: Work directory of the run.
          most_bytes: Maximum size of its files.
        """

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes or 0, most_bytes or 0))

        return subprocess.Popen(
            [*self.command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "",
                "HF_HUB_OFFLINE": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if most_bytes is None else limit,
        )

    def finish(self, workdir: Path, reference: Path) -> str:
        """Runs the command to its end, and returns what is wrong; empty if nothing is."""
        process = self.start(workdir)
        _, said = process.communicate(timeout=LONGEST)
        if process.returncode or "Traceback" in said:
            return f"exit code {process.returncode}: {_last_line(said)}"
        return ", ".join(differences(workdir, reference))


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """Returns the complete records of metrics.jsonl, without timings."""
    file = workdir / "metrics.jsonl"
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the line that is being written
            records.append({k: v for k, v in json.loads(line).items() if k != "timing"})
    return records


def differences(workdir: Path, reference: Path) -> list[str]:
    """Returns the differences between two finished runs."""
    found = []
    ours, theirs = ({p.name: p for p in (w / "adapter").iterdir()} for w in (workdir, reference))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            found.append(f"adapter/{name} is in one alone")
        elif ours[name].read_bytes() != theirs[name].read_bytes():
            found.append(f"adapter/{name} differs")
    one, other = (json.loads((w / "summary.json").read_text()) for w in (workdir, reference))
    found += [f"{key} of summary.json differs" for key in COMPARED if one[key] != other[key]]
    if read_records(workdir) != read_records(reference):
        found.append("metrics.jsonl differs")
    return found


def kill_often(bench: Bench, reference: Path, start_up: float, kills: int, seed: int) -> list[Row]:
    """Kills runs until `kills` processes have been killed.

    Args:
      bench: Folder and command of the runs.
      reference: Work directory of the uninterrupted run.
      start_up: Seconds to the first step.
      kills: Number of processes to kill.
      seed: Seed of the moments.
    """
    rows: list[Row] = []
    done = 0
    for number in range(10 * kills):
        if done >= kills:
            break
        chance = random.Random(f"{seed}, {number}")
        workdir = bench.folder / f"killed-{number}"
        happened = []
        for _ in range(min(kills - done, chance.randint(1, 3))):
            where = _kill_once(bench, workdir, start_up, chance)
            if where is None:
                break  # the run finished before it was killed
            happened.append(where)
        done += len(happened)
        if not happened:
            continue
        rows.append(Row(tuple(happened), bench.finish(workdir, reference)))
        _show(rows[-1])
    return rows


def _kill_once(bench: Bench, workdir: Path, start_up: float, chance: random.Random) -> str | None:
    """Starts the run and kills it; returns where it was, or None if it finished before."""
    before = Progress.of(workdir)
    moment, longest_pause = _draw_moment(before, start_up, chance)
    pause = chance.uniform(0.0, longest_pause)
    process, began = bench.start(workdir), time.monotonic()
    while process.poll() is None and not moment(Progress.of(workdir), time.monotonic() - began):
        if time.monotonic() - began > LONGEST:
            break
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    _, said = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise RuntimeError(f"a run failed before it was killed: {_last_line(said)}")
        return None
    return Progress.of(workdir).describe(before)


def _draw_moment(
    before: Progress, start_up: float, chance: random.Random
) -> tuple[Callable[[Progress, float], bool], float]:
    """Draws the moment of a kill: a condition on progress and seconds, and the longest pause."""
    kind = chance.choice(["start-up", "step", "checkpoint", "checkpoint", "export"])
    after = chance.uniform(0.2, 1.0) * start_up
    reached = max([before.step, *before.unfinished])
    step = chance.randint(min(reached + 1, STEPS), STEPS)
    if kind == "start-up" or before.exporting:
        # A run that had started to export finishes soon after its start-up.
        return lambda _, seconds: seconds >= after, 0.1
    if kind == "step" and reached < STEPS:
        return lambda now, _: now.step >= step, 0.1
    if kind == "checkpoint" and reached < STEPS:
        return lambda now, _: max(now.unfinished, default=0) >= step, 0.05
    return lambda now, _: now.exporting, 1.0


def fill_disks(bench: Bench, reference: Path, count: int, seed: int, *, tmpfs: bool) -> list[Row]:
    """Runs on full disks, of sizes between zero and what a run needs.

    Args:
      bench: Folder and command of the runs.
      reference: Work directory of the uninterrupted run.
      count: Number of runs.
      seed: Seed of the sizes.
      tmpfs: Whether to mount file systems, or to limit the size of files.
    """
    rows = []
    sizes = [path.stat().st_size for path in reference.rglob("*") if path.is_file()]
    most = sum(-(-size // PAGE) * PAGE for size in sizes) if tmpfs else max(sizes)
    chance = random.Random(seed)
    for number in range(count):
        size = max(PAGE, int(most * (number + chance.random()) / count))
        workdir = bench.folder / f"full-{number}" / "run"
        workdir.parent.mkdir()
        with mounted(workdir.parent, size) if tmpfs else contextlib.nullcontext():
            process = bench.start(workdir, most_bytes=None if tmpfs else size)
            _, said = process.communicate(timeout=LONGEST)
            where = Progress.of(workdir).describe(Progress(0, frozenset(), False))
            fault = fault_of_ending(process.returncode, said)
            if tmpfs:
                _run("mount", "-o", f"remount,size={ROOM}", str(workdir.parent))
            fault = fault or bench.finish(workdir, reference)
            rows.append(Row((f"{size // 1024} KiB, {where}",), fault))
        _show(rows[-1])
    return rows


def fault_of_ending(code: int, said: str) -> str:
    """Returns why a run on a full disk did not end with one line and exit code 1; empty if so."""
    messages = [line for line in said.splitlines() if line.startswith("train.py: ")]
    if code != exits.ExitCode.FAILED:
        return f"exit code {code} on a full disk: {_last_line(said)}"
    if len(messages) != 1 or _last_line(said) != messages[0] or "Traceback" in said:
        return f"more than one line on a full disk: {said[-2000:]}"
    if "resumes the run" not in messages[0]:
        return f"the message about a full disk does not mention resuming: {messages[0]}"
    return ""


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Mounts a file system of `size` bytes on a folder during the block."""
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        _run("umount", str(folder))


def may_mount(folder: Path) -> bool:
    """Returns whether this user may mount a file system."""
    try:
        with mounted(folder, PAGE):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["nothing was said"])[-1]


def _show(row: Row) -> None:
    print(f"{'; '.join(row.happened)}: {row.fault or 'the same'}", file=sys.stderr, flush=True)


def _table(title: str, rows: list[Row]) -> str:
    lines = [f"| {title} | ended as the other |", "| --- | --- |"]
    lines += [f"| {'; '.join(row.happened)} | {row.fault or 'yes'} |" for row in rows]
    return "\n".join(lines)


def _run_reference(bench: Bench) -> tuple[Path, float]:
    """Runs without interruption; returns the work directory and the seconds to the first step.

    The first run also compiles. The second is timed, and must equal the first.
    """
    first, second = bench.folder / "first", bench.folder / "second"
    process = bench.start(first)
    _, said = process.communicate(timeout=LONGEST)
    if process.returncode:
        raise RuntimeError(f"the uninterrupted run failed: {_last_line(said)}")
    began = time.monotonic()
    process = bench.start(second)
    while process.poll() is None and not Progress.of(second).step:
        time.sleep(0.01)
    start_up = time.monotonic() - began
    process.communicate(timeout=LONGEST)
    if found := differences(second, first):
        raise RuntimeError(f"two uninterrupted runs differ: {', '.join(found)}")
    return first, start_up


@exits.command("benchmarks.reliability")
def main() -> int:
    """Runs everything and prints two tables."""
    parser = Arguments("benchmarks.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of processes to kill")
    parser.add_argument("--full_disks", type=int, default=5, help="number of runs on a full disk")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and sizes")
    parser.add_argument("--method", default="lora", help="fine-tuning method")
    parser.add_argument(
        "--disk",
        choices=["auto", "tmpfs", "limit"],
        default="auto",
        help="what is full: a tmpfs, or a limit of the size of files",
    )
    parser.add_argument("--folder", type=Path, help="folder of the runs (a temporary one)")
    parser.add_argument(
        "--output", type=Path, default=Path("out/bench"), help="folder of the results"
    )
    options = parser.parse_args()
    began = time.monotonic()
    if options.folder is not None:
        options.folder.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory()
        if options.folder is None
        else contextlib.nullcontext(options.folder.absolute())
    ) as folder:
        bench = Bench.make(Path(folder), options.method)
        tmpfs = options.disk == "tmpfs"
        if options.disk == "auto":
            probe = Path(folder, "probe")
            probe.mkdir()
            tmpfs = may_mount(probe)
        reference, start_up = _run_reference(bench)
        killed = kill_often(bench, reference, start_up, options.kills, options.seed)
        full = fill_disks(bench, reference, options.full_disks, options.seed, tmpfs=tmpfs)
    kills = sum(len(row.happened) for row in killed)
    disk = "tmpfs" if tmpfs else "limit of a file's size"
    faults = sum(bool(row.fault) for row in [*killed, *full])
    text = "\n\n".join(
        [
            f"{kills} kills of {len(killed)} runs, {len(full)} full disks ({disk}),"
            f" {faults} ended otherwise; seed {options.seed}, method {options.method},"
            f" {os.cpu_count()} cores, {(time.monotonic() - began) / 60:.0f} minutes.",
            _table("killed", killed),
            _table("full disk", full),
        ]
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "reliability.md").write_text(f"{text}\n")
    print(text)
    return exits.ExitCode.FAILED if faults or kills < options.kills else exits.ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
