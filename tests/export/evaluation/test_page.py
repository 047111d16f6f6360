"""The page: whole HTML, nothing from elsewhere, and no word of a model or a file that could be markup."""

from html.parser import HTMLParser

import msgspec
import numpy as np

from sonoedge.calibration.questions import Question, Task
from sonoedge.export.evaluation.answers import Answered, Said, Seen
from sonoedge.export.evaluation.cases import Case
from sonoedge.export.evaluation.page import evaluation_html
from sonoedge.export.evaluation.result import Evaluation, System
from sonoedge.export.evaluation.score import score

HOSTILE = '</td><script>alert("1")</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp;'
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str | None] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class Pictures:
    """Cases of two pictures."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Case:
        image = np.random.default_rng(index).integers(0, 255, (400, 640, 3), np.uint8)
        return Case(HOSTILE, (image, image[:50, :50]), ())


def evaluation(words: str) -> Evaluation:
    """Nine cases of two systems, every word of them `words`."""
    asked = (
        Question(Task.REPORT, words, words, (words + " more of it.",)),
        Question(Task.DIAGNOSIS, "single choice", words, ("A",), ("A", "B"), (words, "other"), 0),
    )
    seen = tuple(Seen(words, asked, words if n % 2 else "liver", None, n, n) for n in range(9))
    told = tuple((Said(words, "stop"), Said("B", "stop", 1, (0.1, 0.9))) for _ in range(9))
    scored = score([Answered(seen, told)] * 2, [words, "two"])
    return Evaluation(
        frames=9,
        data=words,
        systems=(System(words, words, words), System("two", "two", words)),
        questions=18,
        scores=scored.scores,
        classes=scored.classes,
        confusion=scored.confusion,
        worst=scored.worst,
        notes=(words,),
    )


def test_no_word_becomes_markup_and_nothing_is_fetched() -> None:
    found = evaluation(HOSTILE)
    page = evaluation_html(found, Pictures())
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in reader.sources)
    assert len(reader.sources) == reader.tags.count("img") == 2 * len(found.worst)
    assert HOSTILE in "".join(reader.text)


def test_what_was_measured_and_how_stands_on_the_page() -> None:
    page = evaluation_html(evaluation("words"))
    for told in ("BLEU-4", "ROUGE-L", "macro-F1", "all but liver", "seed 20250918", "sacrebleu&#x27;s zh", "McNemar"):
        assert told in page
    assert "<img" not in page


def test_the_result_survives_json() -> None:
    found = evaluation("words")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Evaluation) == found
