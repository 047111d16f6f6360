"""BLEU and ROUGE of answers: English in words, Chinese in characters, each counted by its standard library.

A text's counts are kept apart from the score of many, so that what is reported once can be resampled a thousand times.

Sources: K. Papineni et al., "BLEU" (ACL 2002), as sacrebleu computes it; C.-Y. Lin, "ROUGE" (2004), as rouge-score
computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer as RougeTokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

TOKENIZATION = {
    "en": "BLEU: sacrebleu's 13a (words and punctuation); ROUGE: rouge-score's default (words in lower case)",
    "zh": "BLEU and ROUGE: sacrebleu's zh (Chinese by characters, punctuation apart, other words whole)",
}
_BLEU_TOKENIZER = {"en": "13a", "zh": "zh"}


class TextScore(msgspec.Struct, frozen=True):
    """How close texts are to those they are compared with, in points: 0 to 100."""

    bleu1: float  # of all texts together, brevity penalty included
    rouge1: float  # F-measure, mean over the texts

    def __sub__(self, other: TextScore) -> TextScore:
        """The difference of both scores in points."""
        return TextScore(self.bleu1 - other.bleu1, self.rouge1 - other.rouge1)


class _Characters(RougeTokenizer):  # type: ignore[misc]  # the library is untyped
    """Chinese for rouge-score, which knows Latin letters only."""

    def __init__(self) -> None:
        self._split = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = self._split(text).split()
        return tokens


ORDERS = 4  # BLEU's longest n-grams
ROUGE = ("rouge1", "rougeL")
STATISTICS = 2 * ORDERS + 2 + len(ROUGE)


def text_statistics(text: str, wanted: Sequence[str], language: str) -> npt.NDArray[np.float64]:
    """What one text adds to the scores of many: [12], against one or more wordings, the closest of which counts.

    Matching n-grams of 1 to 4, all n-grams of 1 to 4, tokens, tokens wanted, then the F-measures of ROUGE-1 and ROUGE-L
    (0 to 1). language: a key of TOKENIZATION.
    """
    bleu, rouge = _scorers(language)
    counted = bleu.sentence_score(text, list(wanted))
    measures = rouge.score_multi(list(wanted), text)
    lengths = [counted.sys_len, counted.ref_len]
    return np.array([*counted.counts, *counted.totals, *lengths, *(measures[name].fmeasure for name in ROUGE)])


def bleu(sums: npt.NDArray[np.float64], order: int) -> float:
    """BLEU-`order` in points of texts whose statistics [12] were added up: uniform weights, with brevity penalty."""
    counts = [int(value) for value in sums[: 2 * ORDERS + 2]]
    score = BLEU.compute_bleu(
        counts[:order],
        counts[ORDERS : ORDERS + order],
        sys_len=counts[2 * ORDERS],
        ref_len=counts[2 * ORDERS + 1],
        smooth_method="exp",
        max_ngram_order=order,
    )
    return float(score.score)


def score_texts(texts: Sequence[str], wanted: Sequence[Sequence[str]], language: str) -> TextScore:
    """Score at least one text, each against one or more wordings of what it should say, the closest of which counts.

    language: a key of TOKENIZATION.
    """
    rows = [text_statistics(text, right, language) for text, right in zip(texts, wanted, strict=True)]
    sums = np.sum(rows, axis=0)
    return TextScore(bleu1=bleu(sums, 1), rouge1=float(100 * sums[2 * ORDERS + 2] / len(rows)))


@functools.cache
def _scorers(language: str) -> tuple[BLEU, RougeScorer]:
    tokenizer = _Characters() if language == "zh" else None
    # effective_order: only so that the library does not warn of single sentences, whose own score is not used.
    return BLEU(tokenize=_BLEU_TOKENIZER[language], effective_order=True), RougeScorer(ROUGE, tokenizer=tokenizer)
