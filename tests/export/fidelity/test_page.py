"""The page: whole HTML, nothing from elsewhere, and no word of a model that could be markup."""

from html.parser import HTMLParser

import msgspec
import numpy as np

from sonoedge.calibration.table import RoutingRow
from sonoedge.export.divergence import Divergence
from sonoedge.export.fidelity.cases import Case
from sonoedge.export.fidelity.page import report_html
from sonoedge.export.fidelity.result import (
    CalibrationError,
    Divergences,
    Fidelity,
    Histogram,
    Metrics,
    Routing,
    Texts,
    WorstCase,
)
from sonoedge.export.fidelity.text_scores import TextScore
from sonoedge.export.scheme import Scheme
from sonoedge.export.sensitivity import Move, Trace

HOSTILE = '</td><script>alert("1")</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp;'
VOID = {"meta", "img", "circle", "line", "rect", "polyline"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class Pictures:
    """Cases that have pictures and no questions."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Case:
        image = np.random.default_rng(index).integers(0, 255, (400, 640, 3), np.uint8)
        return Case(HOSTILE, (image, image[:50, :50]), "en", ())


def full_report(words: str) -> Fidelity:
    """A report with every section, all its words `words`."""
    divergence = Divergences(9, 0.1, 0.2, 0.3, 0.9, Histogram((1e-8, 0.1, 10.0), (4, 5)))
    score = TextScore(50.0, 60.0)
    metrics = Metrics(
        divergence,
        answers={"overall": 0.5, words: 0.25},
        hints={"overall": 0.5, words: 0.25},
        texts={"en": Texts(5, words, score, 5, score, score, TextScore(-0.5, 1.0))},
        router=Routing(0.97, (0.96, 0.98)),
        image_sqnr_db="infinite",
        hidden_sqnr_db=(33.25, 21.5),
        calibration_error=CalibrationError({words: 0.1}, {words: 0.2}),
        not_measured={"answers_by_language": words},
    )
    found = Divergence(0.5, 0.9, 0.8)
    moves = (Move(words, Scheme.W8A8, Scheme.W8A16, found, found, 2_000_000),)
    trace = Trace({words: found}, None, found, moves, found, 2_000_000, None, (words,))
    return Fidelity(
        frames=2,
        questions=3,
        shipped=words,
        variants={words: metrics, "cache int8": Metrics(divergence)},
        worst=(WorstCase(1, words, 0.3, 0.2, words, words, f"{words}.", words), WorstCase(0, words, 0.3, 0.2)),
        missed=(words,),
        search=trace,
        schemes={words: Scheme.W8A8},
        routing=(RoutingRow("all", words, (30, 10)), RoutingRow(words, words, (3, 0))),
    )


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_a_hostile_word_is_text_wherever_it_stands() -> None:
    reader = read(report_html(full_report(HOSTILE), Pictures()))
    assert "script" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    loaded = [value for name, value in reader.attributes if name in {"src", "href", "action", "data", "srcset"}]
    assert len(loaded) == 4  # two pictures of each of two cases
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in loaded)
    shown = "".join(reader.text)
    assert shown.count(HOSTILE) > 15  # as it was said, in every section


def test_the_page_refers_to_nothing_elsewhere() -> None:
    page = report_html(full_report("plain"), Pictures())
    for way_out in ("http:", "https:", "//", "@import", "url("):
        assert way_out not in page.replace("data:image/png;base64,", "").split("<body>")[0]
    assert "http" not in "".join(part.split('">')[-1] for part in page.split("base64,"))
    assert "default-src &#x27;none&#x27;" in page


def test_numbers_are_on_the_page() -> None:
    shown = " ".join(read(report_html(full_report("plain"))).text)
    for words in ("90.00 %", "50.00 %", "25.00 %", "97.00 %", "∞", "33.2", "21.5", "-0.50", "+1.00", "0.200", "75.0 %"):
        assert words in shown, words
    assert "answers differ" in shown
    assert "not measured" in shown
    assert "Floors of the recipe that are missed" in shown


def test_a_report_of_logits_alone_makes_a_page() -> None:
    divergence = Divergences(9, 0.1, 0.2, 0.3, 0.9, Histogram((1e-8, 10.0), (9,)))
    fidelity = Fidelity(1, 1, "int8", {"int8": Metrics(divergence)}, (WorstCase(0, "a case", 0.3, 0.2),))
    reader = read(report_html(fidelity))
    shown = " ".join(reader.text)
    assert "The recipe sets no floor." in shown
    assert "Layer by layer" not in shown
    assert "answers differ" not in shown
    held = msgspec.structs.replace(fidelity, missed=())
    assert "Every floor of the recipe is held." in report_html(held)


def test_the_same_report_gives_the_same_page_in_any_language() -> None:
    page = report_html(full_report("病灶"), Pictures())
    assert page == report_html(full_report("病灶"), Pictures())
    assert "病灶" in page


def test_a_long_search_shows_its_worst_blocks() -> None:
    trace = full_report("plain").search
    assert trace is not None
    alone = {f"block {index}": Divergence(index / 100, 1, 1) for index in range(99)}
    page = report_html(
        msgspec.structs.replace(full_report("plain"), search=msgspec.structs.replace(trace, alone=alone))
    )
    shown = "".join(read(page).text)
    assert "the 40 worst of 99 blocks" in shown
    assert "block 98" in shown
    assert "block 58" not in shown
