"""BLEU-1 and ROUGE-1 against hand counts and against the libraries' own corpus scores."""

import math

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from sonoedge.export.fidelity.text_scores import TOKENIZATION, TextScore, score_texts


def test_english_by_hand() -> None:
    """Tokens of BLEU: the cat sat . ; five wanted, four given, all of them right. ROUGE: 3 of 3, 3 of 4 words."""
    found = score_texts(["The cat sat."], [["The cat sat down."]], "en")
    assert found.bleu1 == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert found.rouge1 == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)


def test_chinese_by_hand_is_counted_in_characters() -> None:
    """左 侧 囊 肿 。 against 右 侧 囊 肿 。: four of five characters for both scores."""
    found = score_texts(["左侧囊肿。"], [["右侧囊肿。"]], "zh")
    assert found.bleu1 == pytest.approx(80)
    assert found.rouge1 == pytest.approx(80)


def test_numbers_stay_whole_in_chinese() -> None:
    """大 小 20 毫 米 against 大 小 25 毫 米: four of five tokens."""
    assert score_texts(["大小20毫米"], [["大小25毫米"]], "zh").rouge1 == pytest.approx(80)


def test_a_corpus_scores_as_the_libraries_score_it() -> None:
    texts = ["Ultrasound of the liver, image quality good.", "No lesion is seen.", ""]
    wanted = ["Ultrasound of the kidney, image quality poor.", "There is no lesion.", "Something."]
    found = score_texts(texts, [[right] for right in wanted], "en")
    assert found.bleu1 == BLEU(max_ngram_order=1).corpus_score(texts, [wanted]).score
    scorer = RougeScorer(["rouge1"])
    each = [scorer.score(right, text)["rouge1"].fmeasure for text, right in zip(texts, wanted, strict=True)]
    assert found.rouge1 == pytest.approx(100 * sum(each) / 3)


def test_equal_texts_have_every_point() -> None:
    for language, text in (("en", "A cyst lies deep."), ("zh", "深部可见囊肿。")):
        found = score_texts([text], [[text]], language)
        assert (found.bleu1, found.rouge1) == pytest.approx((100, 100))


def test_a_difference_keeps_its_sign() -> None:
    assert TextScore(50, 60) - TextScore(51, 57) == TextScore(-1, 3)


def test_every_language_says_how_it_is_tokenized() -> None:
    assert set(TOKENIZATION) == {"en", "zh"}


def test_the_closest_wording_counts_and_texts_may_have_fewer_than_others() -> None:
    """BLEU's tokens: no lesion is seen . and a cyst . , each found in one of its wordings."""
    wanted = [("Nothing.", "No lesion is seen."), ("A cyst.",)]
    found = score_texts(["No lesion is seen.", "A cyst."], wanted, "en")
    assert (found.bleu1, found.rouge1) == pytest.approx((100, 100))
    one = score_texts(["No lesion is seen.", "A mass."], wanted, "en")
    assert one.bleu1 == pytest.approx(100 * 7 / 8)
    assert one.rouge1 == pytest.approx(75)
