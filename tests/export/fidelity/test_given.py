"""The comparison with recorded logits: what is left when the float model does not fit in memory."""

from collections.abc import Callable

import numpy as np
import pytest

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.answers import Asker, spoken
from sonoedge.export.fidelity.given import GivenCase, RecordedCase, measure_given, measure_recorded
from sonoedge.export.fidelity.measure import Variant
from sonoedge.export.fidelity.metrics import kl_divergence
from sonoedge.export.fidelity.probes import TorchProbe
from sonoedge.export.fidelity.result import report_json
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.prompt import question_ids
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[[float], Variant]


@pytest.fixture
def recorded(reference: TorchSession, frames: PhantomPool, tiny_tokenizer: Tokenizer) -> list[GivenCase]:
    """Two frames with a right answer, and the float model's logits where its tokens are due."""
    made = []
    for index in range(2):
        asker = Asker("f", reference, tiny_tokenizer)
        asker.begin(asker.look([frames[index].rgb()]), "en")
        answer = tiny_tokenizer.encode("A cyst.")
        prompt = asker.whole(question_ids(tiny_tokenizer, "What is it?"), answer)
        rows = np.arange(len(prompt.ids) - len(answer), len(prompt.ids))
        reference.rewind(0)
        logits = reference.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds, logits_rows=rows)
        trace = TorchProbe(reference.model).trace(prompt)
        images = (frames[index].patches(reference.image),)
        made.append(GivenCase(f"frame {index}", images, prompt.ids, prompt.positions, rows, logits, trace))
    return made


def test_logits_and_layers_are_compared_and_the_rest_is_named(recorded: list[GivenCase], variant: Make) -> None:
    variants = {"damaged": variant(0.1), "same": variant(0)}
    found = measure_given(recorded, variants, experts_per_token=2)
    assert found.frames == 2
    assert found.variants["same"].divergence.largest < 1e-9
    assert found.variants["same"].divergence.top1 == 1
    assert found.metrics.divergence.tokens == sum(len(case.rows) for case in recorded)
    assert found.metrics.router is not None
    assert found.metrics.router.overall < 1
    assert found.metrics.hidden_sqnr_db is not None
    assert set(found.metrics.not_measured) == {
        "answers",
        "answers_by_language",
        "tossups_aside",
        "widest_parting",
        "hints",
        "texts",
        "image_sqnr_db",
        "calibration_error",
    }
    assert "does not fit in memory" in found.metrics.not_measured["answers"]
    assert {case.name for case in found.worst} == {"frame 0", "frame 1"}
    assert found.worst[0].largest_kl == found.metrics.divergence.largest
    assert found.worst[0].float_answer is None
    assert report_json(found)


def test_the_divergence_is_that_of_the_given_rows(recorded: list[GivenCase], variant: Make) -> None:
    damaged = variant(0.1)
    case = recorded[0]
    embeds = damaged.session.encode_image(case.images[0])
    damaged.session.rewind(0)
    logits = damaged.session.extend(case.ids, case.positions, image_embeds=embeds, logits_rows=case.rows)
    spoken = np.arange(logits.shape[1]) != damaged.session.spec.image_token_id
    wanted = kl_divergence(case.logits[:, spoken], logits[:, spoken])
    found = measure_given([case], {"damaged": damaged}).metrics
    assert found.divergence.mean == pytest.approx(wanted.mean(), rel=1e-4)


def test_nothing_to_compare_is_refused(variant: Make) -> None:
    with pytest.raises(SonoEdgeError, match="at least one case"):
        measure_given([], {"v": variant(0)})


def test_recorded_logits_of_both_models_are_compared(recorded: list[GivenCase]) -> None:
    """As if each were a session; the image token, which no answer can hold, is out of reach for both."""
    image = 511
    cases = []
    for case in recorded:
        other = case.logits[:, ::-1].copy()
        other[:, image] = 1e3
        cases.append(RecordedCase(case.name, case.logits, other))
    found = measure_recorded("other", cases, image)
    kl = np.concatenate([kl_divergence(*(spoken(x, image, "x") for x in (c.reference, c.variant))) for c in cases])
    assert found.shipped == "other"
    assert found.frames == len(cases)
    assert found.metrics.divergence.mean == pytest.approx(kl.mean())
    assert found.metrics.divergence.largest == pytest.approx(kl.max())
    assert "does not fit in memory" in found.metrics.not_measured["answers"]
    same = measure_recorded("same", [RecordedCase(c.name, c.reference, c.reference) for c in cases], image)
    assert same.metrics.divergence.largest == 0
    cases[0].variant[0, 0] = np.nan
    with pytest.raises(SonoEdgeError, match="other gives logits that are not finite"):
        measure_recorded("other", cases, image)
