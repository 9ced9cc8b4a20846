"""Measures over a whole set of predictions, with standard errors.

Each is called with the items (reference, prediction) of all rows, as the harness does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sacrebleu

from peft_jax.data.recipes.measures import pearson, spearman

RESAMPLES = 1000
"""How many times items are drawn anew for a standard error."""

_TOKENIZERS = {"zho": "zh", "cmn": "zh", "yue": "zh"}
_WITHOUT_SPACES = ("jpn", "tha", "lao", "khm", "mya", "bod", "dzo", "shn")
"""Languages written without spaces for which sacrebleu's tokenizers need more than it brings."""


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A correlation of references and predictions.

    Attributes:
      kind: "pearson" or "spearman".
    """

    kind: str

    def __call__(self, items: Sequence[tuple[float, float]]) -> float:
        """The correlation; 0 where one side is constant."""
        measure = {"pearson": pearson, "spearman": spearman}[self.kind]
        right, said = np.asarray(items, np.float64).T
        return measure(said, right)

    def standard_error(self, items: Sequence[tuple[float, float]]) -> float:
        """By the bootstrap."""
        return bootstrap_standard_error(self, items)


@dataclasses.dataclass(frozen=True)
class TranslationScore:
    """BLEU or chrF of a whole set, by sacrebleu, from 0 to 100.

    Attributes:
      kind: "bleu" or "chrf".
      language: the language translated to, by FLORES's code; BLEU's tokenizer depends on it.
    """

    kind: str
    language: str

    def __call__(self, items: Sequence[tuple[str, str]]) -> float:
        """The score."""
        references, predictions = zip(*items, strict=True)
        return self._metric().corpus_score(predictions, [references]).score

    def standard_error(self, items: Sequence[tuple[str, str]]) -> float:
        """By the bootstrap over sacrebleu's counts of each sentence.

        Its own bootstrap fails where a drawn set scores 0, as small ones do.
        """
        references, predictions = zip(*items, strict=True)
        metric = self._metric()
        counts = np.asarray(metric._extract_corpus_statistics(predictions, [references]))

        def score(drawn: np.ndarray) -> float:
            return metric._compute_score_from_stats(counts[drawn].sum(axis=0).tolist()).score

        return bootstrap_standard_error(score, np.arange(len(items)))

    @property
    def signature(self) -> str:
        """Sacrebleu's own record of what was computed, which a score is quoted with."""
        metric = self._metric()
        metric.corpus_score(["a"], [["a"]])
        return metric.get_signature().format()

    def _metric(self) -> Any:
        if self.kind == "chrf":
            return sacrebleu.CHRF()
        return sacrebleu.BLEU(tokenize=bleu_tokenizer(self.language))


def bleu_tokenizer(language: str) -> str:
    """Sacrebleu's tokenizer for a language: "zh" for Chinese, characters where there are no spaces.

    Example:
      >>> [bleu_tokenizer(code) for code in ("deu_Latn", "zho_Hans", "tha_Thai")]
      ['13a', 'zh', 'char']
    """
    language = language.partition("_")[0]
    return _TOKENIZERS.get(language, "char" if language in _WITHOUT_SPACES else "13a")


def bootstrap_standard_error(
    measure: Callable[[Any], float], items: Any, *, resamples: int = RESAMPLES
) -> float:
    """The standard deviation of a measure over sets drawn from the items with replacement.

    Args:
      measure: called with as many items as there are.
      items: one for each row, in an array or what makes one.
      resamples: how many sets are drawn.

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
