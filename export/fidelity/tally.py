"""Gathers what one variant does differently, case by case, into its metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration
from sonoedge.calibration.confidence import expected_calibration_error
from sonoedge.calibration.scores import HintScores
from sonoedge.export.fidelity.cases import FREE_TEXT
from sonoedge.export.fidelity.metrics import Floats, SignalToNoise, expert_sets, kl_divergence
from sonoedge.export.fidelity.probes import Trace
from sonoedge.export.fidelity.result import TOSSUP, CalibrationError, Divergences, Histogram, Metrics, Routing, Texts
from sonoedge.export.fidelity.text_scores import TOKENIZATION, score_texts

EDGES_NATS = tuple(float(10.0**power) for power in range(-8, 2))


class Pair(msgspec.Struct, frozen=True):
    """One answer of both models."""

    task: str
    language: str
    float_text: str
    variant_text: str
    truths: tuple[str, ...]
    parting: float  # the float model's lead where the variant leaves its answer, 0 where it does not


class Tally:
    """The differences of one variant from the float model so far."""

    def __init__(self, experts_per_token: int) -> None:
        self._top = experts_per_token
        self._kl: list[npt.NDArray[np.float64]] = []
        self._same: list[npt.NDArray[np.bool_]] = []
        self._pairs: list[Pair] = []
        self._hints: dict[str, list[bool]] = defaultdict(list)
        self._scores: dict[str, list[tuple[Floats, Floats, int]]] = defaultdict(list)  # float's, variant's, right
        self._images = SignalToNoise()
        self._hidden: list[SignalToNoise] = []
        self._routed: list[list[npt.NDArray[np.bool_]]] = []  # by layer
        self._looked = False

    def tokens(self, reference: Floats, variant: Floats) -> npt.NDArray[np.float64]:
        """Take in the logits [n, vocab] of both models where n tokens are due; the divergence [n] of each in nats."""
        divergence = kl_divergence(reference, variant)
        self._kl.append(divergence)
        self._same.append(reference.argmax(axis=1) == variant.argmax(axis=1))
        return divergence

    def answer(self, pair: Pair) -> None:
        """Take in one greedy answer of both models."""
        self._pairs.append(pair)

    def hint(self, name: str, reference: Floats, variant: Floats, right: int | None) -> None:
        """Take in the scores [candidates] that both models give to one hint."""
        self._hints[name].append(int(reference.argmax()) == int(variant.argmax()))
        if right is not None:
            self._scores[name].append((reference, variant, right))

    def images(self, reference: Iterable[Floats], variant: Iterable[Floats]) -> None:
        """Take in the image tokens [merged, hidden] of each picture."""
        self._looked = True
        for wanted, found in zip(reference, variant, strict=True):
            self._images.add(wanted, found)

    def trace(self, reference: Trace, variant: Trace) -> None:
        """Take in what the layers of both models made of one sequence."""
        self._hidden = self._hidden or [SignalToNoise() for _ in reference.hidden]
        self._routed = self._routed or [[] for _ in reference.router]
        for gathered, wanted, found in zip(self._hidden, reference.hidden, variant.hidden, strict=True):
            gathered.add(wanted, found)
        for layer, wanted, found in zip(self._routed, reference.router, variant.router, strict=True):
            layer.append((expert_sets(wanted, self._top) == expert_sets(found, self._top)).all(axis=1))

    def metrics(self, calibration: Mapping[str, HintCalibration], reasons: Mapping[str, str]) -> Metrics:
        """Everything gathered; `reasons` say why what is missing was not measured, by field."""
        found = Metrics(
            divergence=self._divergences(),
            answers=self._agreement(lambda pair: pair.task),
            answers_by_language=self._agreement(lambda pair: pair.language),
            tossups_aside=self._agreement(lambda pair: pair.task, tossup=TOSSUP),
            widest_parting=max((pair.parting for pair in self._pairs), default=None),
            hints=_shares(self._hints),
            texts=self._texts(),
            router=self._routing(),
            image_sqnr_db=self._images.decibels if self._looked else None,
            hidden_sqnr_db=tuple(layer.decibels for layer in self._hidden) or None,
            calibration_error=self._calibration_error(calibration),
        )
        absent = {name: reasons[name] for name, value in msgspec.structs.asdict(found).items() if value is None}
        return msgspec.structs.replace(found, not_measured=absent)

    def _divergences(self) -> Divergences:
        kl = np.concatenate(self._kl)
        edges = np.array([*EDGES_NATS[:-1], np.inf])
        counts, _ = np.histogram(np.maximum(kl, EDGES_NATS[0]), edges)
        return Divergences(
            tokens=len(kl),
            mean=float(kl.mean()),
            p99=float(np.quantile(kl, 0.99)),
            largest=float(kl.max()),
            top1=float(np.concatenate(self._same).mean()),
            histogram=Histogram(EDGES_NATS, tuple(int(count) for count in counts)),
        )

    def _agreement(self, group: Callable[[Pair], str], tossup: float = 0) -> dict[str, float] | None:
        groups: dict[str, list[bool]] = defaultdict(list)
        for pair in self._pairs:
            groups[group(pair)].append(pair.float_text == pair.variant_text or pair.parting < tossup)
        return _shares(groups)

    def _texts(self) -> dict[str, Texts] | None:
        groups: dict[str, list[Pair]] = defaultdict(list)
        for pair in self._pairs:
            if pair.task in FREE_TEXT:
                groups[pair.language].append(pair)
        return {language: _text_scores(pairs, language) for language, pairs in sorted(groups.items())} or None

    def _routing(self) -> Routing | None:
        if not self._routed:
            return None
        layers = [np.concatenate(layer) for layer in self._routed]
        return Routing(float(np.concatenate(layers).mean()), tuple(float(layer.mean()) for layer in layers))

    def _calibration_error(self, calibration: Mapping[str, HintCalibration]) -> CalibrationError | None:
        if not self._scores:
            return None
        before, after = ({name: _hint_scores(rows, side) for name, rows in self._scores.items()} for side in (0, 1))
        return CalibrationError(
            float_model={name: expected_calibration_error(scores, 1.0) for name, scores in before.items()},
            variant={name: expected_calibration_error(scores, 1.0) for name, scores in after.items()},
            recalibrated={
                name: expected_calibration_error(scores, calibration[name])
                for name, scores in after.items()
                if name in calibration
            }
            or None,
        )


def _shares(groups: Mapping[str, list[bool]]) -> dict[str, float] | None:
    """The share of true entries: overall, and of each group."""
    if not groups:
        return None
    everything = [same for group in groups.values() for same in group]
    return {"overall": float(np.mean(everything))} | {name: float(np.mean(group)) for name, group in groups.items()}


def _text_scores(pairs: list[Pair], language: str) -> Texts:
    float_texts, variant_texts = [pair.float_text for pair in pairs], [pair.variant_text for pair in pairs]
    known = [pair for pair in pairs if pair.truths]
    compared = Texts(
        answers=len(pairs),
        tokenization=TOKENIZATION[language],
        variant_against_float=score_texts(variant_texts, [(text,) for text in float_texts], language),
        answers_with_truth=len(known),
    )
    if not known:
        return compared
    truths = [pair.truths for pair in known]
    before = score_texts([pair.float_text for pair in known], truths, language)
    after = score_texts([pair.variant_text for pair in known], truths, language)
    return msgspec.structs.replace(
        compared, float_against_truth=before, variant_against_truth=after, change=after - before
    )


def _hint_scores(rows: list[tuple[Floats, Floats, int]], side: int) -> HintScores:
    return HintScores(
        np.arange(len(rows)), np.stack([row[side] for row in rows]), np.array([right for _, _, right in rows])
    )
