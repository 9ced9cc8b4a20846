"""Measures what a reader of a study must know of a task's data and base model."""

import collections
import unicodedata
from typing import Any

import jax
import numpy as np

from peft_jax.core import flatten
from peft_jax.data import EvalData

from .bench import Bench
from .cell import rounded
from .settings import ArmSettings, StudySettings, TaskSettings, digest
from .trials import Trial

_BLOCK = 32
_LEVELS = 16
_BLOCKS = 256


def task_facts(bench: Bench, seed: int) -> dict[str, Any]:
    """Returns the facts of a task.

    Args:
      bench: Model and data of the task.
      seed: Seed whose training rows are counted.

    Returns:
      "rows", the numbers of rows by "train", "tuning" and "test"; "text", what the tokenizer loses
      of the test rows; "base_loss", the base model's loss on the test rows, None without a head
      for them; "base_parameters"; "four_bit", whether the base's kernels were quantized to four
      bits before.
    """
    totals = {
        "train": bench.totals(seed),
        **{which: data.totals for which, data in bench.held_out.items()},
    }
    params = flatten(bench.params(seed))
    return {
        "rows": {
            which: {
                "rows": one.rows,
                "checked": one.checked,
                "used": one.used,
                "left_out": dict(one.left_out),
                "truncated": one.truncated,
            }
            for which, one in totals.items()
        },
        "text": lost_text(bench.tokenizer, texts_of(bench.held_out["test"])),
        "base_loss": rounded(bench.base_loss(), 6),
        "base_parameters": sum(int(np.prod(leaf.shape)) for leaf in params.values()),
        "four_bit": any(
            has_few_levels(leaf)
            for path, leaf in params.items()
            if path[-1] == "kernel" and isinstance(leaf, jax.Array)
        ),
    }


def facts_digest(study: StudySettings, task: TaskSettings) -> str:
    """Returns a digest of the settings that determine the facts of a task."""
    arm: ArmSettings = study.arms_of(task)[0]
    return digest(task.run_config(arm, Trial(1.0), seed=0), task, final=False)


def texts_of(data: EvalData) -> list[str]:
    """Returns the text of each row, as the model reads it."""
    return [
        " ".join(example.sentences) or "".join(piece.text for piece in example.pieces)
        for example in data.examples
    ]


def lost_text(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Counts the characters that a tokenizer drops or replaces.

    White space, letter case and the composition of letters do not count.

    Returns:
      "rows", "rows_affected", "characters", "lost" and "symbols", the most frequent lost
      characters with their numbers.
    """
    lost: collections.Counter[str] = collections.Counter()
    affected = characters = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        before = _characters(text)
        missing = before - _characters(tokenizer.decode(ids, skip_special_tokens=True))
        characters += before.total()
        affected += bool(missing)
        lost += missing
    return {
        "rows": len(texts),
        "rows_affected": affected,
        "characters": characters,
        "lost": lost.total(),
        "symbols": dict(lost.most_common(12)),
    }


def _characters(text: str) -> collections.Counter[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return collections.Counter("".join(folded.split()))


def has_few_levels(kernel: Any) -> bool:
    """Returns whether a kernel takes at most 16 values in each block of 32 inputs.

    Kernels that were quantized to four bits and dequantized again do; others do not.

    Args:
      kernel: [..., d_in, d_out].
    """
    columns = np.asarray(kernel[..., :, :_BLOCKS], np.float32)
    columns = np.moveaxis(columns.reshape(-1, *columns.shape[-2:])[0], -1, 0)
    if columns.shape[-1] % _BLOCK:
        return False
    blocks = columns.reshape(-1, _BLOCK)[:_BLOCKS]
    return all(len(np.unique(block)) <= _LEVELS for block in blocks)
