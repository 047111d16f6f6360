"""The sections of the fidelity page that show what was measured; what is absent gives an empty section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from sonoedge.export.fidelity import plots
from sonoedge.export.fidelity.markup import Html, Part, figure, table
from sonoedge.export.fidelity.metrics import Decibels
from sonoedge.export.fidelity.result import TOSSUP, Fidelity, Metrics, WorstCase
from sonoedge.export.fidelity.text_scores import TextScore

OVERALL = "overall"  # the share over all tasks, languages or hints


def opening(fidelity: Fidelity) -> Html:
    """What was compared, and whether the floors hold."""
    tokens = fidelity.metrics.divergence.tokens
    counted = f"{fidelity.frames:,} frames, {fidelity.questions:,} questions, {tokens:,} tokens of answers"
    if fidelity.missed is None:
        verdict = '<div class="verdict">The recipe sets no floor.</div>'
    elif fidelity.missed:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in fidelity.missed)
        verdict = f'<div class="verdict missed">Floors of the recipe that are missed:<ul>{items}</ul></div>'
    else:
        verdict = '<div class="verdict">Every floor of the recipe is held.</div>'
    title = f"<h1>Fidelity: {escape(fidelity.shipped)} against {escape(fidelity.reference)}</h1>"
    return Html(f'{title}<p class="muted">{counted}, the same for both models</p>{verdict}')


def agreement(fidelity: Fidelity) -> Html:
    """Every variant's own column of agreement."""
    rows: list[Sequence[object]] = [
        _row(fidelity, "most likely tokens agree", lambda m: _percent(m.divergence.top1)),
        _row(fidelity, "KL of next-token distributions, mean (nats)", lambda m: f"{m.divergence.mean:.3g}"),
        _row(fidelity, Part("99th percentile"), lambda m: f"{m.divergence.p99:.3g}"),
        _row(fidelity, Part("largest"), lambda m: f"{m.divergence.largest:.3g}"),
        *_shares(fidelity, "greedy answers are equal", lambda m: m.answers),
        *_shares(fidelity, "", lambda m: m.answers_by_language),
        *_shares(fidelity, f"equal, or parting where float's lead is under {TOSSUP:.0%}", lambda m: m.tossups_aside),
        _row(
            fidelity,
            "float's largest lead where an answer parts",
            lambda m: None if m.widest_parting is None else _percent(m.widest_parting),
        ),
        *_shares(fidelity, "hints are equal", lambda m: m.hints),
        _row(fidelity, "tokens go to the same experts", lambda m: m.router and _percent(m.router.overall)),
        _row(fidelity, "image tokens, signal to noise (dB)", lambda m: m.image_sqnr_db and _decibels(m.image_sqnr_db)),
    ]
    reasons = {
        f"{name}: {field.replace('_', ' ')}: {reason}"
        for name, metrics in fidelity.variants.items()
        for field, reason in metrics.not_measured.items()
    }
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in sorted(reasons))
    absent = f"<details><summary>What was not measured, and why</summary><ul>{notes}</ul></details>" if notes else ""
    return Html(f"<h2>Agreement with the float model</h2>{table(['', *fidelity.variants], rows)}{absent}")


def texts(fidelity: Fidelity) -> Html:
    """Word scores of free answers, against the truth and against the float model's words."""
    rows: list[Sequence[object]] = []
    tokenization: dict[str, str] = {}
    for name, metrics in fidelity.variants.items():
        for language, found in (metrics.texts or {}).items():
            tokenization[language] = found.tokenization
            compared = (
                found.float_against_truth,
                found.variant_against_truth,
                found.change,
                found.variant_against_float,
            )
            for label, field in (("BLEU-1", "bleu1"), ("ROUGE-1", "rouge1")):
                scores = [_points(score, field, signed=score is found.change) for score in compared]
                rows.append([f"{label}, {language}, {found.answers} answers, {name}", *scores])
    if not rows:
        return Html("")
    header = ["points", "float", "variant", "change", "variant against float's words"]
    notes = "; ".join(f"{language}: {how}" for language, how in tokenization.items())
    return Html(f"<h2>Reports and conversations</h2>{table(header, rows)}<p><small>{escape(notes)}</small></p>")


def layers(fidelity: Fidelity) -> Html:
    """Signal to noise and routing, layer by layer."""
    metrics = fidelity.metrics
    drawn = ""
    if metrics.hidden_sqnr_db is not None:
        named: list[tuple[str, Decibels]] = []
        if metrics.image_sqnr_db is not None:
            named.append(("image tokens", metrics.image_sqnr_db))
        named += [(f"layer {index}", value) for index, value in enumerate(metrics.hidden_sqnr_db)]
        rows = [(name, 0.0 if value == "infinite" else value, _decibels(value)) for name, value in named]
        caption = "Signal to quantization noise of hidden states in dB, higher is closer to float"
        drawn += figure(caption, plots.bars(rows, caption))
    if metrics.router is not None:
        parted = [(f"layer {index}", 100 * (1 - share)) for index, share in enumerate(metrics.router.layers)]
        caption = "Tokens that go to another set of experts than in float, in % of all tokens"
        drawn += figure(caption, plots.bars([(name, part, f"{part:.2f} %") for name, part in parted], caption))
    return Html(f"<h2>Layer by layer</h2>{drawn}" if drawn else "")


def divergence(fidelity: Fidelity) -> Html:
    """How the divergence spreads over tokens."""
    histogram = fidelity.metrics.divergence.histogram
    edges = [f"{edge:g}" for edge in histogram.edges_nats]
    caption = "Tokens by KL of their next-token distributions in nats; the outer columns hold what lies beyond"
    return Html(f"<h2>Divergence</h2>{figure(caption, plots.columns(histogram.counts, edges, caption))}")


def confidence(fidelity: Fidelity) -> Html:
    """How far the probabilities of hints can be trusted, before and after."""
    rows: list[Sequence[object]] = []
    for name, metrics in fidelity.variants.items():
        error = metrics.calibration_error
        for hint, before in (error.float_model if error else {}).items():
            assert error is not None
            mended = (error.recalibrated or {}).get(hint)
            numbers = ("" if value is None else f"{value:.3f}" for value in (before, error.variant[hint], mended))
            rows.append([f"{hint}, {name}", *numbers])
    if not rows:
        return Html("")
    header = ["expected calibration error", "float", "variant", "variant with the bundle's temperatures"]
    return Html(f"<h2>Confidence of hints</h2>{table(header, rows)}")


def worst(fidelity: Fidelity, pictures: Mapping[int, Sequence[Html]]) -> Html:
    """The worst cases, both answers side by side under the picture's question."""
    cards = "".join(_card(case, pictures.get(case.case, ()), fidelity.shipped) for case in fidelity.worst)
    return Html(f"<h2>Where the models differ most</h2>{cards}")


def _card(case: WorstCase, pictures: Sequence[Html], shipped: str) -> str:
    rows: list[Sequence[object]] = [
        (label, words)
        for label, words in (
            ("question", case.question),
            ("float", case.float_answer),
            (shipped, case.variant_answer),
            ("truth", case.truth),
        )
        if words is not None
    ]
    differ = ' <span class="differ">answers differ</span>' if case.float_answer != case.variant_answer else ""
    numbers = f"largest KL {case.largest_kl:.3g}, mean {case.mean_kl:.3g} nats"
    shown = f'<div class="images">{"".join(pictures)}</div>' if pictures else ""
    return (
        f'<div class="case">{shown}<div class="said"><h3>{escape(case.name)}{differ}</h3>'
        f"<p><small>{numbers}</small></p>{table([], rows)}</div></div>"
    )


def _row(fidelity: Fidelity, label: str, read: Callable[[Metrics], object]) -> Sequence[object]:
    return [label, *(read(metrics) for metrics in fidelity.variants.values())]


def _shares(
    fidelity: Fidelity, label: str, read: Callable[[Metrics], Mapping[str, float] | None]
) -> list[Sequence[object]]:
    """The overall share under `label`, where there is one, and every part of it below."""
    parts = dict.fromkeys(name for metrics in fidelity.variants.values() for name in read(metrics) or {})
    parts.pop(OVERALL, None)
    wanted = [(OVERALL, label)] if label else []
    rows: list[Sequence[object]] = []
    for name, words in [*wanted, *((part, Part(part)) for part in parts)]:
        found = [(read(metrics) or {}).get(name) for metrics in fidelity.variants.values()]
        rows.append([words, *(None if share is None else _percent(share) for share in found)])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _decibels(value: Decibels) -> str:
    return "∞" if value == "infinite" else f"{value:.1f}"


def _points(score: TextScore | None, field: str, *, signed: bool) -> str | None:
    if score is None:
        return None
    value: float = getattr(score, field)
    return f"{value:+.2f}" if signed else f"{value:.2f}"
