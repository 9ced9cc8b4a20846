"""Runs two workers in turn, and compares their times pair by pair."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Side:
    """Times of one worker.

    Attributes:
      label: Name in the table.
      seconds: Seconds per step, by round.
      peak_bytes: Peak memory of its process, or of its GPU if it has one.
      facts: Facts that the worker reported.
    """

    label: str
    seconds: list[float]
    peak_bytes: int
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sides that ran in turn."""

    name: str
    ours: Side
    theirs: Side

    @property
    def ratios(self) -> list[float]:
        """Ratios of our times to theirs, by round."""
        return [a / b for a, b in zip(self.ours.seconds, self.theirs.seconds, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


class Worker:
    """Process of a worker.

    Args:
      module: Module of the worker.
      arguments: Arguments of its command.
      python: Python that runs it; by default, that of this process.
    """

    def __init__(self, module: str, *arguments: str, python: str | Path = sys.executable) -> None:
        environment = os.environ | {
            # Idle threads must sleep, not spin, while the other worker is timed.
            "OMP_WAIT_POLICY": "PASSIVE",
            # Both workers share one GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            [str(python), "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def compile(self) -> None:
        """Lets the worker compile and warm up, and waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.facts = self._answer()

    def run(self, steps: int) -> dict[str, Any]:
        """Runs a number of steps and returns the worker's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process.

        Raises:
          RuntimeError: The process ended with an error.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(timeout=60) != 0:
            raise RuntimeError(f"{self._process.args} ended with {self._process.returncode}")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)


def run_in_turn(
    workers: Mapping[str, tuple[str, ...]],
    *,
    rounds: int,
    steps: int,
    pythons: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Side]:
    """Runs workers in turn, A B C A B C …, all warm.

    Args:
      workers: Module and arguments of each worker, by name.
      rounds: Number of turns of each worker.
      steps: Number of training steps in a turn.
      pythons: Python of workers with an environment of their own, by name.

    Returns:
      Times of each worker, by name.

    Raises:
      RuntimeError: A worker ended with an error.
    """
    processes = {
        name: Worker(*command, python=pythons.get(name, sys.executable))
        for name, command in workers.items()
    }
    for name, process in processes.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        process.compile()
        process.facts["seconds_to_compile"] = time.perf_counter() - began
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, process in processes.items():
            answers[name].append(process.run(steps))
    for process in processes.values():
        process.close()
    return {
        name: Side(
            label=f"{process.facts['library']} {process.facts['method']}",
            seconds=[answer["seconds"] for answer in answers[name]],
            peak_bytes=max(answer["peak_bytes"] for answer in answers[name]),
            facts=process.facts,
        )
        for name, process in processes.items()
    }


def compare(
    name: str,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    *,
    rounds: int,
    steps: int,
    their_python: Path | None = None,
) -> Comparison:
    """Runs two workers in turn, A B A B …, both warm.

    Args:
      name: Name of the comparison.
      ours: Module and arguments of our worker.
      theirs: Module and arguments of the other worker.
      rounds: Number of pairs.
      steps: Number of training steps in each half of a pair.
      their_python: Python of the other worker, if it has an environment of its own.
    """
    sides = run_in_turn(
        {"ours": ours, "theirs": theirs},
        rounds=rounds,
        steps=steps,
        pythons={"theirs": their_python} if their_python else {},
    )
    return Comparison(name, sides["ours"], sides["theirs"])


def table(comparisons: list[Comparison]) -> str:
    """Returns the comparisons as a Markdown table."""
    lines = [
        "| | s/step | compared with, s/step | ratio: median (min – max) | memory, GiB |"
        " s to the first steps |",
        "| --- | ---: | ---: | --- | --- | --- |",
    ]
    for c in comparisons:
        lines.append(
            f"| {c.name} | {statistics.median(c.ours.seconds):.3f} |"
            f" {statistics.median(c.theirs.seconds):.3f} |"
            f" **{c.ratio:.2f}** ({min(c.ratios):.2f} – {max(c.ratios):.2f}) |"
            f" {c.ours.peak_bytes / 2**30:.2f} / {c.theirs.peak_bytes / 2**30:.2f} |"
            f" {c.ours.facts['seconds_to_compile']:.0f} /"
            f" {c.theirs.facts['seconds_to_compile']:.0f} |"
        )
    return "\n".join(lines)
