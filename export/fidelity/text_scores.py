"""BLEU-1 and ROUGE-1 of answers: English in words, Chinese in characters, each scored by its standard library.

Sources: K. Papineni et al., "BLEU" (ACL 2002), as sacrebleu computes it; C.-Y. Lin, "ROUGE" (2004), as rouge-score
computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
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


def score_texts(texts: Sequence[str], wanted: Sequence[Sequence[str]], language: str) -> TextScore:
    """Score at least one text, each against one or more wordings of what it should say, the closest of which counts.

    language: a key of TOKENIZATION.
    """
    bleu = BLEU(max_ngram_order=1, tokenize=_BLEU_TOKENIZER[language])
    rouge = RougeScorer(["rouge1"], tokenizer=_Characters() if language == "zh" else None)
    measures = [rouge.score_multi(right, text)["rouge1"].fmeasure for text, right in zip(texts, wanted, strict=True)]
    # sacrebleu takes the first wording of every text, then the second of every text: where there is none, the first.
    streams = [
        [right[index] if index < len(right) else right[0] for right in wanted] for index in range(max(map(len, wanted)))
    ]
    return TextScore(
        bleu1=float(bleu.corpus_score(list(texts), streams).score),
        rouge1=100 * sum(measures) / len(measures),
    )
