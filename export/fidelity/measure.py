"""Runs the float model and its quantized variants over the same cases and says how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from sonoedge.bundle import HintCalibration
from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.answers import Answer, Asker
from sonoedge.export.fidelity.cases import Asked, Case, Cases
from sonoedge.export.fidelity.metrics import lead
from sonoedge.export.fidelity.probes import Probe, TorchProbe
from sonoedge.export.fidelity.result import Fidelity, WorstCase
from sonoedge.export.fidelity.tally import Pair, Tally
from sonoedge.export.torch_session import TorchSession
from sonoedge.progress import track
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.prompt import HINT_LANGUAGE, question_ids
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

MAX_TOKENS = 192  # of an answer
WORST = 10
NO_PROBE = "the layers of the variant were not probed"
REASONS = {
    "answers": "the cases ask no question",
    "answers_by_language": "the cases ask no question",
    "tossups_aside": "the cases ask no question",
    "widest_parting": "the cases ask no question",
    "hints": "the cases name no hint",
    "texts": "the cases ask for no report and hold no conversation",
    "router": NO_PROBE,
    "hidden_sqnr_db": NO_PROBE,
    "calibration_error": "the cases say no right answer to a hint",
}


class Variant(msgspec.Struct, frozen=True):
    """One quantized form of the model; its layers are compared where there is a probe."""

    session: Session
    probe: Probe | None = None
    calibration: Mapping[str, HintCalibration] = {}  # of hints, as the bundle ships it


def measure(
    reference: TorchSession,
    variants: Mapping[str, Variant],
    tokenizer: Tokenizer,
    cases: Cases,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Fidelity:
    """Compare `variants`, the first being what is shipped, with the float `reference` on all `cases`.

    max_tokens: the longest answer. Raises SonoEdgeError when there is no case or variant, when a picture or question
    does not fit the context, and for logits that are not finite.
    """
    if not len(cases) or not variants:
        raise SonoEdgeError("nothing to compare: fidelity needs at least one case and one quantized model")
    run = _Run(reference, variants, tokenizer, max_tokens)
    worst = []
    with track(f"compare with float: {', '.join(variants)}", len(cases)) as advance:
        for index in range(len(cases)):
            worst.append(run.case(cases[index], index))
            advance(1)
    reasons = REASONS if reference.model.config.moe else REASONS | {"router": "the model has no experts"}
    shipped = next(iter(variants))
    return Fidelity(
        frames=len(cases),
        questions=run.questions,
        shipped=shipped,
        variants={name: run.tallies[name].metrics(variants[name].calibration, reasons) for name in variants},
        worst=worst_of(worst),
    )


def worst_of(found: Sequence[WorstCase]) -> tuple[WorstCase, ...]:
    """The cases with the largest divergence, worst first; of equals, the first."""
    return tuple(sorted(found, key=lambda case: -case.largest_kl)[:WORST])


class _Run:
    """The sessions of one comparison, each with its own view of the current frame."""

    def __init__(
        self, reference: TorchSession, variants: Mapping[str, Variant], tokenizer: Tokenizer, max_tokens: int
    ) -> None:
        sessions: dict[str, Session] = {name: variant.session for name, variant in variants.items()}
        schema = load_schema()
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._reference = Asker("the float model", reference, tokenizer)
        self._askers = {name: Asker(name, session, tokenizer) for name, session in sessions.items()}
        self._engine = HintEngine(reference, tokenizer, schema)
        self._engines = {name: HintEngine(session, tokenizer, schema) for name, session in sessions.items()}
        self._probe = TorchProbe(reference.model)
        self._probes = {name: variant.probe for name, variant in variants.items() if variant.probe is not None}
        moe = reference.model.config.moe
        self.tallies = {name: Tally(moe.num_experts_per_tok if moe else 0) for name in variants}
        self.questions = 0

    def case(self, case: Case, index: int) -> WorstCase:
        """Take in one case and return the question on which the shipped variant is furthest off."""
        looks = self._reference.look(case.images)
        seen = {name: asker.look(case.images) for name, asker in self._askers.items()}
        for name, tally in self.tallies.items():
            tally.images([look.embeds for look in looks], [look.embeds for look in seen[name]])
        if case.hints:
            wanted = self._engine.scores(looks[0])
            for name, engine in self._engines.items():
                found = engine.scores(seen[name][0])
                for hint, right in case.hints.items():
                    self.tallies[name].hint(hint, wanted[hint], found[hint], right)
        self._reference.begin(looks, HINT_LANGUAGE)
        for name, asker in self._askers.items():
            asker.begin(seen[name], HINT_LANGUAGE)
        worst = [self._question(case, asked, index) for asked in case.asked]
        return max(worst, key=lambda question: question.largest_kl)

    def _question(self, case: Case, asked: Asked, index: int) -> WorstCase:
        self.questions += 1
        question = question_ids(self._tokenizer, asked.text)
        room = min(asker.room(question) for asker in (self._reference, *self._askers.values()))
        if room < 1:
            raise SonoEdgeError(
                f"{case.name}: no answer to {asked.text!r} fits the context behind its pictures: raise limits.context "
                "in the recipe"
            )
        limit = min(room, self._max_tokens)
        drafts = {name: asker.greedy(question, limit) for name, asker in self._askers.items()}
        shipped = next(iter(drafts))
        answer = self._reference.checked(question, drafts[shipped].tokens, limit)
        texts = {name: self._tokenizer.decode(draft.tokens) for name, draft in drafts.items()}
        float_text = self._tokenizer.decode(answer.tokens)
        divergences = {}
        for name, tally in self.tallies.items():
            found = self._askers[name].along(question, answer.tokens, drafts[name])
            divergences[name] = tally.tokens(answer.logits, found)
            tally.answer(
                Pair(asked.task, case.language, float_text, texts[name], asked.truths, _parting(answer, drafts[name]))
            )
        if asked is case.asked[-1] and self._probes:
            self._trace(question, answer)
        return WorstCase(
            case=index,
            name=case.name,
            largest_kl=float(divergences[shipped].max()),
            mean_kl=float(divergences[shipped].mean()),
            question=asked.text,
            float_answer=float_text,
            variant_answer=texts[shipped],
            truth=asked.truths[0] if asked.truths else None,
        )

    def _trace(self, question: Sequence[int], answer: Answer) -> None:
        """Compare the layers on one sequence, each model with its own image tokens."""
        wanted = self._probe.trace(self._reference.whole(question, answer.tokens))
        for name, probe in self._probes.items():
            self.tallies[name].trace(wanted, probe.trace(self._askers[name].whole(question, answer.tokens)))


def _parting(answer: Answer, draft: Answer) -> float:
    """How much more probable the float model finds its own token than the variant's where they part; else 0."""
    for row, mine, other in zip(answer.logits, answer.tokens, draft.tokens, strict=False):
        if mine != other:
            return lead(row, mine, other)
    return 0.0
