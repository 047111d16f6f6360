"""The comparison that remains when the float model fits no memory: its logits on given answers, recorded beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.answers import spoken
from sonoedge.export.fidelity.measure import NO_PROBE, Variant, worst_of
from sonoedge.export.fidelity.metrics import Floats
from sonoedge.export.fidelity.probes import Trace
from sonoedge.export.fidelity.result import Fidelity, WorstCase
from sonoedge.export.fidelity.tally import Tally
from sonoedge.runtime.look import Prompt
from sonoedge.runtime.preprocess import Patches

NOT_ANSWERED = (
    "answers",
    "answers_by_language",
    "tossups_aside",
    "widest_parting",
    "hints",
    "texts",
    "image_sqnr_db",
    "calibration_error",
)
REASON = "the float model does not fit in memory and was not run here: only its logits on given answers are compared"


class GivenCase(msgspec.Struct, frozen=True):
    """One sequence of s tokens, and what the float model made of it."""

    name: str
    images: tuple[Patches, ...]
    ids: npt.NDArray[np.int64]  # [s], prompt and answer
    positions: npt.NDArray[np.int64]  # [3, s]
    rows: npt.NDArray[np.int64]  # [r], where the tokens of the answer are due
    logits: Floats  # [r, vocab]
    trace: Trace | None = None


def measure_given(
    cases: Iterable[GivenCase], variants: Mapping[str, Variant], *, experts_per_token: int = 0
) -> Fidelity:
    """Compare `variants`, the first being what is shipped, with recorded logits; answers and hints are not measured.

    experts_per_token: needed where cases hold traces. Raises SonoEdgeError when there is no case or variant, and for
    logits that are not finite.
    """
    tallies = {name: Tally(experts_per_token) for name in variants}
    shipped = next(iter(variants), "")
    worst: list[WorstCase] = []
    traced = False
    for index, case in enumerate(cases):
        traced |= case.trace is not None
        kl = {name: _compare(case, variant, tallies[name], name) for name, variant in variants.items()}
        if shipped:
            worst.append(WorstCase(index, case.name, float(kl[shipped].max()), float(kl[shipped].mean())))
    if not worst:
        raise SonoEdgeError("nothing to compare: fidelity needs at least one case and one quantized model")
    layers = "the model has no experts" if traced else NO_PROBE
    reasons = dict.fromkeys(NOT_ANSWERED, REASON) | {"router": layers, "hidden_sqnr_db": NO_PROBE}
    return Fidelity(
        frames=len(worst),
        questions=len(worst),
        shipped=shipped,
        variants={name: tallies[name].metrics(variants[name].calibration, reasons) for name in variants},
        worst=worst_of(worst),
    )


class RecordedCase(msgspec.Struct, frozen=True):
    """What two models that fit no memory made of one sequence: logits [r, vocab] where its answers are due."""

    name: str
    reference: Floats
    variant: Floats


def measure_recorded(shipped: str, cases: Iterable[RecordedCase], image_token_id: int) -> Fidelity:
    """Compare recorded logits of the variant `shipped` with the float model's; there is at least one case.

    Raises SonoEdgeError for logits that are not finite.
    """
    tally, worst = Tally(0), []
    for index, case in enumerate(cases):
        wanted = spoken(case.reference, image_token_id, "the float model")
        kl = tally.tokens(wanted, spoken(case.variant, image_token_id, shipped))
        worst.append(WorstCase(index, case.name, float(kl.max()), float(kl.mean())))
    reasons = dict.fromkeys(NOT_ANSWERED, REASON) | {"router": NO_PROBE, "hidden_sqnr_db": NO_PROBE}
    return Fidelity(len(worst), len(worst), shipped, {shipped: tally.metrics({}, reasons)}, worst_of(worst))


def _compare(case: GivenCase, variant: Variant, tally: Tally, name: str) -> npt.NDArray[np.float64]:
    """Take in one case and return the divergence [r] of each token in nats."""
    session = variant.session
    embeds = [session.encode_image(image) for image in case.images]
    joined = np.concatenate(embeds) if embeds else np.empty((0, session.spec.hidden), np.float32)
    session.rewind(0)
    logits = session.extend(case.ids, case.positions, image_embeds=joined, logits_rows=case.rows)
    session.rewind(0)
    token = session.spec.image_token_id
    if case.trace is not None and variant.probe is not None:
        tally.trace(case.trace, variant.probe.trace(Prompt(case.ids, case.positions, 0, joined)))
    return tally.tokens(spoken(case.logits, token, "the float model"), spoken(logits, token, name))
