r"""Recomputes a study's statistics from its cells with scipy, and fails if they disagree.

    python -m eval.study.recheck --cells=WORKDIR/cells --statistics=PAGE/statistics.json

It reads the cells by itself and shares no code with the page: the t-test is
scipy.stats.ttest_rel, and the bootstrap draws indices of seeds and rows.

Exit codes: 0 all agree; 1 some disagree; 2 a file is missing or not readable.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

ROUNDS = 4000
_BATCHES = 8
_AT_ONCE = 250
_STANDARD_ERRORS = 6.0
"""Allowed distance of an interval's ends, in standard errors of this bootstrap."""


@exits.command("eval.study.recheck", stopped="stopped")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = Arguments("eval.study.recheck", description=__doc__)
    parser.add_argument("--cells", type=Path, required=True, help="folder of the cells")
    parser.add_argument(
        "--statistics", type=Path, required=True, help="statistics.json beside the page"
    )
    given = parser.parse_args(argv)
    statistics = json.loads(given.statistics.read_text(encoding="utf-8"))
    wrong = disagreements(given.cells, statistics)
    number = len(statistics["contrasts"]) + len(statistics["exploratory"])
    for line in wrong:
        print(line)
    print(f"{number} comparisons rechecked, {len(wrong)} disagreements")
    return exits.ExitCode.FAILED if wrong else exits.ExitCode.DONE


def disagreements(cells: Path, statistics: Mapping[str, Any]) -> list[str]:
    """Returns a line for each statistic that the cells do not confirm.

    Args:
      cells: Folder with TASK/ARM/seed-N.json.
      statistics: Content of `statistics.json`.
    """
    wrong = []
    for record in (*statistics["contrasts"], *statistics["exploratory"]):
        name = f"{record['task']}: {record['one']} - {record['other']}"
        seeds = statistics["seeds"][record["task"]]
        for field, (found, tolerance) in _recomputed(cells, record, seeds).items():
            if not abs(found - record[field]) <= tolerance:
                wrong.append(f"{name}: {field} is {record[field]:.6g}, but should be {found:.6g}")
    for record in statistics["contrasts"]:
        best = _better_branch(cells / record["task"], statistics["branches"])
        if best != record["other"]:
            wrong.append(
                f"{record['task']}: the contrast is with {record['other']}, but the branch with the"
                f" lower tuning loss is {best}"
            )
    return wrong + _wrong_corrections(statistics)


def _recomputed(
    cells: Path, record: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """Returns each statistic of a comparison with the allowed distance."""
    losses, targets = {}, np.empty(0)
    for name in (record["one"], record["other"]):
        read = [_read(cells / record["task"] / name / f"seed-{seed}.json") for seed in seeds]
        losses[name] = np.array([cell["row_losses"] for cell in read], float)
        targets = np.array(read[0]["row_targets"], float)
    one, other = losses[record["one"]], losses[record["other"]]
    means = [part @ np.ones(len(targets)) / targets.sum() for part in (one, other)]
    gap = means[0] - means[1]
    same = bool(np.all(gap == gap[0]))
    p = float(gap[0] == 0.0) if same else float(stats.ttest_rel(*means).pvalue)
    ends = bootstrap_ends(one - other, targets)
    low, high = ends.mean(axis=0)
    low_error, high_error = stats.sem(ends, axis=0) * _STANDARD_ERRORS
    scale = 1e-9 + 1e-6 * float(np.abs(gap).max())
    return {
        "difference": (float(np.mean(gap)), scale),
        "deviation": (float(np.std(gap, ddof=1)), scale),
        "low": (float(low), float(low_error) + scale),
        "high": (float(high), float(high_error) + scale),
        "p": (p, 1e-6),
        "seeds_ahead": (float(np.sum(gap < 0)), 0.0),
        "seeds": (float(len(seeds)), 0.0),
        "rows": (float(len(targets)), 0.0),
    }


def bootstrap_ends(differences: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the 2.5% and 97.5% quantiles of several independent crossed bootstraps.

    Args:
      differences: [seeds, rows], differences of summed losses.
      targets: [rows], numbers of targets.

    Returns:
      [batches, 2], whose spread is the Monte-Carlo error.
    """
    generator = np.random.Generator(np.random.MT19937(20_07))
    seeds, rows = differences.shape
    ends = []
    for _ in range(_BATCHES):
        means: list[float] = []
        while len(means) < ROUNDS:
            some_seeds = generator.integers(seeds, size=(_AT_ONCE, seeds))
            some_rows = generator.integers(rows, size=(_AT_ONCE, rows))
            drawn = np.take_along_axis(differences[some_seeds].mean(axis=1), some_rows, axis=1)
            means.extend(drawn.sum(axis=1) / targets[some_rows].sum(axis=1))
        ends.append(stats.scoreatpercentile(means, [2.5, 97.5]))
    return np.array(ends)


def _better_branch(folder: Path, branches: Sequence[str]) -> str:
    """Returns the branch that has the tuning run with the lowest loss."""
    lowest = {}
    for name in branches:
        found = [_read(file)["loss"] for file in sorted((folder / name).glob("tune-*.json"))]
        lowest[name] = min((loss for loss in found if loss is not None), default=math.inf)
    return min(lowest, key=lowest.__getitem__)


def _wrong_corrections(statistics: Mapping[str, Any]) -> list[str]:
    """Checks Holm's correction by its definition, with p = 1 for unfinished contrasts."""
    contrasts = statistics["contrasts"]
    known = [record["p"] for record in contrasts]
    every = sorted(known + [1.0] * (statistics["planned_contrasts"] - len(known)))
    wrong = []
    for record in contrasts:
        # The largest of the adjusted p-values up to this one in order.
        before = [p for p in every if p <= record["p"]]
        adjusted = max((len(every) - at) * p for at, p in enumerate(before))
        if not math.isclose(min(1.0, adjusted), record["corrected_p"], abs_tol=1e-9):
            wrong.append(
                f"{record['task']}: corrected_p is {record['corrected_p']:.6g}, but should be"
                f" {min(1.0, adjusted):.6g}"
            )
    return wrong


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
