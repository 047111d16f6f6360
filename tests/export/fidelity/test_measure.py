"""The comparison as a whole: a model against itself, against damaged copies, and where it cannot be made."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from sonoedge.bundle import HintCalibration
from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.answers import Asker
from sonoedge.export.fidelity.cases import PhantomCases
from sonoedge.export.fidelity.measure import Variant, measure
from sonoedge.export.fidelity.result import TOSSUP, Fidelity, report_json
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.prompt import question_ids
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[[float], Variant]


def test_a_model_agrees_with_itself(compared: Fidelity) -> None:
    metrics = compared.variants["same"]
    assert (compared.frames, compared.questions, compared.shipped) == (6, 12, "much")
    assert metrics.divergence.largest < 1e-9
    assert metrics.divergence.top1 == 1
    assert metrics.answers == {"overall": 1, "closed": 1, "report": 1}
    assert metrics.tossups_aside == metrics.answers
    assert metrics.widest_parting == 0
    assert metrics.answers_by_language == {"overall": 1, "en": 1, "zh": 1}
    assert metrics.hints is not None
    assert set(metrics.hints.values()) == {1}
    assert set(metrics.hints) == {"overall", *(hint.name for hint in load_schema().hints)}
    assert metrics.router is not None
    assert metrics.router.overall == 1
    assert set(metrics.router.layers) == {1}
    assert metrics.texts is not None
    assert {language: texts.answers for language, texts in metrics.texts.items()} == {"en": 3, "zh": 3}
    for texts in metrics.texts.values():
        assert texts.change is not None
        assert (texts.change.bleu1, texts.change.rouge1) == (0, 0)
    assert metrics.calibration_error is not None
    assert metrics.calibration_error.float_model == pytest.approx(metrics.calibration_error.variant)
    assert metrics.not_measured == {}
    assert sum(metrics.divergence.histogram.counts) == metrics.divergence.tokens


def test_damage_shows_in_every_measure_and_more_damage_shows_more(compared: Fidelity) -> None:
    little, much = compared.variants["little"], compared.variants["much"]
    assert 0 < little.divergence.mean < much.divergence.mean
    assert little.divergence.mean <= little.divergence.p99 <= little.divergence.largest
    assert much.divergence.top1 < 1
    assert much.answers is not None
    assert much.answers["overall"] < 1
    assert much.tossups_aside is not None
    assert much.answers["overall"] <= much.tossups_aside["overall"] <= 1
    assert much.widest_parting is not None
    assert 0 < much.widest_parting <= 1
    assert (much.tossups_aside["overall"] == 1) == (much.widest_parting < TOSSUP)
    assert little.router is not None
    assert much.router is not None
    assert much.router.overall < little.router.overall < 1
    assert much.router.overall == pytest.approx(np.mean(much.router.layers))
    for before, after in zip(little.hidden_sqnr_db or (), much.hidden_sqnr_db or (), strict=True):
        assert isinstance(before, float)
        assert isinstance(after, float)
        assert after < before
    # Noise of 2 % of a weight's spread is 34 dB below the signal of one product; several add up.
    assert isinstance(little.image_sqnr_db, float)
    assert 15 < little.image_sqnr_db < 40


def test_the_worst_cases_come_worst_first_each_frame_once(compared: Fidelity, cases: PhantomCases) -> None:
    kl = [case.largest_kl for case in compared.worst]
    assert kl == sorted(kl, reverse=True)
    assert kl[0] == compared.metrics.divergence.largest
    assert sorted(case.case for case in compared.worst) == list(range(6))
    for case in compared.worst:
        assert case.question in {asked.text for asked in cases[case.case].asked}


def test_one_model_behind_both_sides_differs_in_no_bit_and_gives_the_same_bytes(
    reference: TorchSession, variant: Make, two_cases: PhantomCases, tiny_tokenizer: Tokenizer
) -> None:
    twin = Variant(TorchSession(reference.model, reference.image, 480), variant(0).probe)
    reports = [measure(reference, {"twin": twin}, tiny_tokenizer, two_cases, max_tokens=2) for _ in range(2)]
    assert report_json(reports[0]) == report_json(reports[1])
    again = msgspec.json.decode(report_json(reports[0]), type=Fidelity)
    assert again.metrics.image_sqnr_db == "infinite"


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_a_checked_draft_is_the_answer_that_steps_find(
    reference: TorchSession, variant: Make, two_cases: PhantomCases, tiny_tokenizer: Tokenizer, noise: float
) -> None:
    """Whatever the draft, the reference's answer is its own greedy one; both models' logits stand at its tokens."""
    asker, other = Asker("f", reference, tiny_tokenizer), Asker("v", variant(noise).session, tiny_tokenizer)
    agreed = set()
    for index in range(2):
        case = two_cases[index]
        for one in (asker, other):
            one.begin(one.look(case.images), case.language)
        for asked in case.asked:
            question = question_ids(tiny_tokenizer, asked.text)
            stepped = asker.greedy(question, 8)
            draft = other.greedy(question, 8)
            checked = asker.checked(question, draft.tokens, 8)
            assert checked.tokens == stepped.tokens
            assert checked.logits == pytest.approx(stepped.logits, abs=1e-4)
            along = other.along(question, checked.tokens, draft)
            # The same tokens in one pass.
            whole = other.whole(question, checked.tokens)
            rows = np.arange(len(whole.ids) - len(checked.tokens), len(whole.ids))
            other.session.rewind(0)
            wanted = other.session.extend(whole.ids, whole.positions, image_embeds=whole.embeds, logits_rows=rows)
            spoken = np.arange(wanted.shape[1]) != other.session.spec.image_token_id
            assert along[:, spoken] == pytest.approx(wanted[:, spoken], abs=1e-4)
            other.begin(other.look(case.images), case.language)
            agreed.add(draft.tokens == checked.tokens)
    assert noise == 0.05 or agreed == {noise == 0}


def test_temperatures_of_the_bundle_are_scored_too(
    reference: TorchSession, variant: Make, two_cases: PhantomCases, tiny_tokenizer: Tokenizer
) -> None:
    shipped = msgspec.structs.replace(variant(0), calibration={"region": HintCalibration(temperature=4.0)})
    error = measure(reference, {"v": shipped}, tiny_tokenizer, two_cases, max_tokens=2).metrics.calibration_error
    assert error is not None
    assert error.recalibrated is not None
    assert set(error.recalibrated) == {"region"}
    assert error.recalibrated["region"] != error.variant["region"]


def test_layers_that_were_not_probed_are_named(
    reference: TorchSession, variant: Make, two_cases: PhantomCases, tiny_tokenizer: Tokenizer
) -> None:
    unprobed = Variant(variant(0).session)
    metrics = measure(reference, {"v": unprobed}, tiny_tokenizer, two_cases, max_tokens=2).metrics
    assert metrics.router is None
    assert metrics.hidden_sqnr_db is None
    assert metrics.not_measured == dict.fromkeys(
        ("router", "hidden_sqnr_db"), "the layers of the variant were not probed"
    )


def test_refusals(reference: TorchSession, variant: Make, two_cases: PhantomCases, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(SonoEdgeError, match="at least one case"):
        measure(reference, {}, tiny_tokenizer, two_cases)
    broken = variant(float("nan"))
    with pytest.raises(SonoEdgeError, match="broken gives logits that are not finite"):
        measure(reference, {"broken": broken}, tiny_tokenizer, two_cases)
    tight = TorchSession(reference.model, reference.image, 20)
    with pytest.raises(SonoEdgeError, match=r"the context holds 20: build the bundle with a larger context"):
        measure(tight, {"v": variant(0)}, tiny_tokenizer, two_cases)
