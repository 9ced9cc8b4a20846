"""Defines tasks that the harness does not have: STS-B as text, and FLORES in any direction.

They use the prompts of the training recipes (`docs/data.md`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from .local_data import recipe_for
from .measures import Correlation, TranslationScore
from .names import flores_languages

Doc = Mapping[str, Any]


def sts_b() -> dict[str, Any]:
    """Returns the configuration of STS-B, where the model writes a similarity from 0 to 5.

    GLUE's metrics are Pearson's and Spearman's correlation. An answer without a number counts as 0,
    and `answered` is the fraction of answers with one.
    """
    recipe, _ = recipe_for("stsb")

    def process_results(doc: Doc, results: list[str]) -> dict[str, Any]:
        number = re.search(r"\d+(?:\.\d+)?", results[0])
        pair = (float(doc["label"]), float(number.group()) if number else 0.0)
        return {"pearson": pair, "spearman": pair, "answered": float(number is not None)}

    return {
        "task": "stsb",
        "output_type": "generate_until",
        "training_split": "train",
        "validation_split": "validation",
        "fewshot_split": "train",
        "doc_to_text": lambda doc: recipe.example(doc).prompt,  # type: ignore[union-attr]
        "doc_to_target": lambda doc: recipe.example(doc).answer,
        "process_results": process_results,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [
            _measure("pearson", Correlation("pearson")),
            _measure("spearman", Correlation("spearman")),
            _measure("answered", "mean"),
        ],
        "metadata": {"version": 1.0},
    }


def flores(task: str) -> dict[str, Any]:
    """Returns the configuration of translation, with BLEU and chrF of the first generated line.

    Args:
      task: Direction, for example flores_eng_Latn-deu_Latn.
    """
    recipe, _ = recipe_for(task)
    _, target = flores_languages(task)

    def process_results(doc: Doc, results: list[str]) -> dict[str, Any]:
        line = next(iter(results[0].strip().splitlines()), "")
        return dict.fromkeys(("bleu", "chrf"), (doc["target"], line))

    scores = {kind: TranslationScore(kind, target) for kind in ("bleu", "chrf")}
    return {
        "task": task,
        "output_type": "generate_until",
        "training_split": "train",
        "validation_split": "validation",
        "fewshot_split": "train",
        "doc_to_text": lambda doc: recipe.example(doc).prompt,  # type: ignore[union-attr]
        "doc_to_target": lambda doc: doc["target"],
        "process_results": process_results,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 256, "do_sample": False},
        "metric_list": [_measure(kind, score) for kind, score in scores.items()],
        "metadata": {
            "version": 1.0,
            "signatures": {kind: score.signature for kind, score in scores.items()},
        },
    }


def _measure(name: str, aggregation: str | Callable[..., float]) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}
