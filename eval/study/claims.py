"""Writes the page that compares the paper's claims with what a study measured."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_jax.runtime.files import write_text

from .analysis import Analysis, Entry
from .convergence import steps_to_match
from .settings import TaskSettings
from .tables import interval, share, table
from .timing import Timing

_NOT_YET = "Not measured yet."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper.

    Attributes:
      title: Title on the page.
      claimed: What the paper says.
      measure: Returns the columns after the task's, and a task's row of them; None without cells.
      head: Names of these columns.
      reading: How to read the table.
      more: What would be needed to say more.
    """

    title: str
    claimed: str
    measure: Callable[[Analysis, TaskSettings], list[str] | None]
    head: tuple[str, ...]
    reading: str
    more: str


def write_claims(analysis: Analysis, file: Path) -> Path:
    """Writes the page of claims, from the finished cells."""
    parts = [
        "# The paper's claims",
        (
            "Sets what *Hybrid and Unitary PEFT for Resource-Efficient Large Language Models*"
            " ([arXiv 2507.18076](https://arxiv.org/abs/2507.18076)) claims in its abstract beside"
            " what [this study](README.md) measured. The paper's models have 7 to 405 billion"
            " parameters. The models here have up to 135 million, so that nothing here refutes a"
            " claim about large ones, or confirms it."
        ),
    ]
    for claim in CLAIMS:
        parts += [f"## {claim.title}", f"**Claimed.** {claim.claimed}", _measured(analysis, claim)]
        parts.append(f"**To say more.** {claim.more}")
    write_text(file, "\n\n".join(parts) + "\n")
    return file


def _measured(analysis: Analysis, claim: Claim) -> str:
    if not claim.head:
        return f"**Measured here.** {claim.reading}"
    rows = []
    for task in analysis.study.tasks:
        row = claim.measure(analysis, task)
        if row is not None:
            rows.append([task.title, *row])
    if not rows:
        return f"**Measured here.** {_NOT_YET}"
    return f"**Measured here.** {claim.reading}\n\n{table(('task', *claim.head), rows)}"


def _pair(analysis: Analysis, task: TaskSettings, other: str) -> tuple[Entry, Entry] | None:
    """Returns the hybrid's entry and another arm's; None unless both are finished."""
    one = analysis.entry(task, analysis.study.roles.hybrid)
    two = analysis.entry(task, other)
    return None if one is None or two is None else (one, two)


def _count(analysis: Analysis, task: TaskSettings) -> str:
    entry = analysis.entry(task, analysis.study.roles.hybrid)
    assert entry is not None
    return f"{len(entry.cells)}, {len(entry.cells[0]['row_losses'])}"


def _quality(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    roles = analysis.study.roles
    found = analysis.compare(task, roles.hybrid, roles.full)
    pair = _pair(analysis, task, roles.full)
    if found is None or pair is None:
        return None
    hybrid, full = pair
    base = analysis.facts[task.name].get("base_loss")
    gain = "no base loss"
    if base is not None:
        gain = share((base - hybrid.loss) / (base - full.loss)) if base > full.loss else "no gain"
    return [_count(analysis, task), interval(found), gain]


def _time(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    costs = _costs(analysis, task)
    if costs is None:
        return None
    hybrid, full = (timing.seconds for timing in costs)
    row = [f"{hybrid:.3f}", f"{full:.3f}", f"{full / hybrid:.2f}×"]
    pair = _pair(analysis, task, analysis.study.roles.full)
    if pair is None or any(entry.diverged for entry in pair):
        return [*row, "not trained"]
    found = steps_to_match(pair[0].cells, pair[1].cells)
    same = "not reached"
    if found.steps is not None:
        whole = pair[1].cells[0]["curve"]["steps"][-1] * full
        same = f"{whole / (found.steps * hybrid):.2f}×"
    return [*row, f"{same}, {found.reached} of {found.seeds} seeds"]


def _memory(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    costs = _costs(analysis, task)
    if costs is None:
        return None
    hybrid, full = (timing.step_bytes / 2**20 for timing in costs)
    return [f"{hybrid:.0f}", f"{full:.0f}", share(hybrid / full)]


def _costs(analysis: Analysis, task: TaskSettings) -> tuple[Timing, Timing] | None:
    """Returns the costs of the hybrid's and full fine-tuning's step; None unless timed."""
    timings, roles = analysis.timings[task.name], analysis.study.roles
    if roles.hybrid not in timings or roles.full not in timings:
        return None
    return timings[roles.hybrid], timings[roles.full]


def _branches(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    roles = analysis.study.roles
    found = [analysis.compare(task, roles.hybrid, name) for name in roles.branches]
    if not found or all(one is None for one in found):
        return None
    planned = analysis.contrasts.get(task.name)
    which = analysis.study.arm(planned.branch).title if planned is not None else ""
    cells = ["not done" if one is None else interval(one) for one in found]
    frozen = analysis.compare(task, roles.hybrid, roles.frozen_rotation)
    control = "not done" if frozen is None else interval(frozen)
    return [_count(analysis, task), " / ".join(cells), which, control]


def _mixing(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    roles = analysis.study.roles
    found = [analysis.compare(task, roles.paper_rule, o) for o in (roles.hybrid, roles.unmixed)]
    if all(one is None for one in found):
        return None
    cells = ["not done" if one is None else interval(one) for one in found]
    return [_count(analysis, task), *cells]


def _unitary(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    roles = analysis.study.roles
    entries = [analysis.entry(task, name) for name in (roles.unitary, roles.lora)]
    if any(entry is None or entry.diverged for entry in entries):
        return None
    row = []
    for entry in entries:
        assert entry is not None
        clipped = [c for cell in entry.cells for c in cell["steps"]["clipped"].values()]
        norms = [_variation(cell["steps"]["grad_norm"]) for cell in entry.cells]
        row.append(
            f"{share(statistics.fmean(clipped)) if clipped else '-'},"
            f" {statistics.fmean(norms):.2f}, {entry.choice.diverged} of {entry.choice.trials}"
        )
    return row


def _variation(norms: Sequence[float]) -> float:
    """Returns the standard deviation of the gradient's norm over steps, relative to its mean."""
    return statistics.pstdev(norms) / statistics.fmean(norms)


def _nothing(analysis: Analysis, task: TaskSettings) -> list[str] | None:
    del analysis, task
    return None


CLAIMS = (
    Claim(
        title="Near full fine-tuning's quality",
        claimed="The hybrid approaches the quality of full fine-tuning.",
        measure=_quality,
        head=("seeds, rows", "hybrid − full, test loss", "share of full's gain over the base"),
        reading="The difference has its 95% interval over seeds and rows; above 0 the hybrid is"
        " worse. The last column divides the hybrid's decrease of the base's loss by that of full"
        " fine-tuning.",
        more="Models of the paper's size, where an adapter has a smaller share of the parameters"
        " and the base knows more of the task; answers scored, and not their likelihood.",
    ),
    Claim(
        title="2.1 times less training time",
        claimed="Training takes about 2.1 times less time than full fine-tuning.",
        measure=_time,
        head=("hybrid, s/step", "full, s/step", "full / hybrid", "full / hybrid to the same loss"),
        reading="The first ratio is of seconds per step, from rounds in which all arms took turns."
        " The second is of the seconds that each needs for full fine-tuning's last loss on held-out"
        " training rows. On a CPU, with small models, without compilation and without the start"
        " along the gradient.",
        more="The same on accelerators, where collectives and memory traffic count, and at a batch"
        " size that the saved memory allows.",
    ),
    Claim(
        title="Half the memory",
        claimed="Peak memory is nearly 50% lower than that of full fine-tuning.",
        measure=_memory,
        head=("hybrid, MiB", "full, MiB", "hybrid / full"),
        reading="Memory of the compiled step as the compiler counts it: parameters, optimizer state"
        " and activations.",
        more="Peak memory of a run on an accelerator, at the paper's sizes, where parameters count"
        " more and activations less.",
    ),
    Claim(
        title="Better than each of its branches",
        claimed="The hybrid converges faster and generalizes better than LoRA-GA and BOFT,"
        " consistently over three runs.",
        measure=_branches,
        head=(
            *("seeds, rows", "hybrid − each branch, test loss", "planned contrast"),
            "hybrid − itself with a frozen rotation",
        ),
        reading="All with equally many trainable parameters and equally many tuning runs. Branches"
        " in the order of the study's settings. The last column is what training the rotation adds."
        " Intervals are over seeds and rows; verdicts, with"
        " their correction, are on [the study's page](README.md).",
        more="More seeds: the deviation of one run decides how small a difference can be shown."
        " Larger models and longer runs.",
    ),
    Claim(
        title="Mixing by gradient norms",
        claimed="Per-layer updates weighted by gradient norms make the hybrid better.",
        measure=_mixing,
        head=("seeds, rows", "paper's rule − default rule", "paper's rule − no mixing"),
        reading="Test losses with their 95% intervals; above 0 the paper's rule is worse."
        " Exploratory, and not corrected.",
        more="The paper's own code: its abstract leaves open which norms are compared and what they"
        " weigh.",
    ),
    Claim(
        title="Unitary constraints make gradients stable",
        claimed="Unitary structure enhances the stability of gradients.",
        measure=_unitary,
        head=("unitary", "LoRA"),
        reading="Each cell: share of clipped steps, deviation of the gradient's norm over steps"
        " relative to its mean, and diverged trials of all tuning runs.",
        more="Deep models and long runs, where gradients vanish or explode; both arms at one size.",
    ),
    Claim(
        title="Few rows in many languages",
        claimed="With 32 examples per language on XNLI and FLORES the gains are consistent.",
        measure=_nothing,
        head=(),
        reading="Not measured yet: no task of this study has 32 rows a language.",
        more="A task with `data.train_rows_by_seed`, so that each seed has rows of its own, and a"
        " multilingual base.",
    ),
    Claim(
        title="Benchmarks of answers",
        claimed="Gains hold on GLUE, GSM8K, MT-Bench and HumanEval, with 7 to 405 billion"
        " parameters.",
        measure=_nothing,
        head=(),
        reading="Not measured: the small models here do not solve GSM8K or HumanEval, so that"
        " scores would be zero for all arms. The study compares losses of reference answers.",
        more="A base that solves some of the problems, on accelerators; `peft-jax eval` runs these"
        " benchmarks.",
    ),
)
