"""Computes corpus metrics, with standard errors.

The harness calls each with the pairs (reference, prediction) of all rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sacrebleu

from peft_jax.data.recipes.measures import pearson, spearman

RESAMPLES = 1000
"""Number of bootstrap resamples for a standard error."""

_TOKENIZERS = {"zho": "zh", "cmn": "zh", "yue": "zh"}
_WITHOUT_SPACES = ("jpn", "tha", "lao", "khm", "mya", "bod", "dzo", "shn")
"""Languages without spaces whose sacrebleu tokenizers need packages that are not installed."""


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Correlation of references and predictions.

    Attributes:
      kind: Name, "pearson" or "spearman".
    """

    kind: str

    def __call__(self, items: Sequence[tuple[float, float]]) -> float:
        """Returns the correlation; 0 if one side is constant."""
        measure = {"pearson": pearson, "spearman": spearman}[self.kind]
        right, said = np.asarray(items, np.float64).T
        return measure(said, right)

    def standard_error(self, items: Sequence[tuple[float, float]]) -> float:
        """Returns the bootstrap standard error."""
        return bootstrap_standard_error(self, items)


@dataclasses.dataclass(frozen=True)
class TranslationScore:
    """Corpus BLEU or chrF by sacrebleu, from 0 to 100.

    Attributes:
      kind: Name, "bleu" or "chrf".
      language: Target language as FLORES's code, which determines BLEU's tokenizer.
    """

    kind: str
    language: str

    def __call__(self, items: Sequence[tuple[str, str]]) -> float:
        """Returns the score."""
        references, predictions = zip(*items, strict=True)
        return self._metric().corpus_score(predictions, [references]).score

    def standard_error(self, items: Sequence[tuple[str, str]]) -> float:
        """Returns the bootstrap standard error, from sacrebleu's counts of each sentence.

        Sacrebleu's own bootstrap fails on a resample that scores 0, which small sets have.
        """
        references, predictions = zip(*items, strict=True)
        metric = self._metric()
        counts = np.asarray(metric._extract_corpus_statistics(predictions, [references]))

        def score(drawn: np.ndarray) -> float:
            return metric._compute_score_from_stats(counts[drawn].sum(axis=0).tolist()).score

        return bootstrap_standard_error(score, np.arange(len(items)))

    @property
    def signature(self) -> str:
        """Returns sacrebleu's signature of the computation, to be reported with a score."""
        metric = self._metric()
        metric.corpus_score(["a"], [["a"]])
        return metric.get_signature().format()

    def _metric(self) -> Any:
        if self.kind == "chrf":
            return sacrebleu.CHRF()
        return sacrebleu.BLEU(tokenize=bleu_tokenizer(self.language))


def bleu_tokenizer(language: str) -> str:
    """Returns sacrebleu's tokenizer for a language; languages without spaces use characters.

    Example:
      >>> [bleu_tokenizer(code) for code in ("deu_Latn", "zho_Hans", "tha_Thai")]
      ['13a', 'zh', 'char']
    """
    language = language.partition("_")[0]
    return _TOKENIZERS.get(language, "char" if language in _WITHOUT_SPACES else "13a")


def bootstrap_standard_error(
    measure: Callable[[Any], float], items: Any, *, resamples: int = RESAMPLES
) -> float:
    """Returns the standard deviation of a metric over bootstrap resamples.

    Args:
      measure: Metric, called with as many items as there are.
      items: Array-like with one item per row.
      resamples: Number of resamples.

    Example:
      >>> items = [(0.0, 0.1), (1.0, 0.8), (2.0, 2.5), (3.0, 2.9)]
      >>> 0.0 < bootstrap_standard_error(Correlation("pearson"), items) < 0.5
      True
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(items), (resamples, len(items)))
    items = np.asarray(items)
    values = [measure(items[indices]) for indices in drawn]
    return float(np.std(values, ddof=1))
