"""The whole protocol over real sockets: freezing, several turns and pictures, reports, choices; in two languages."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.calibration.phantom_wording import DIAGNOSIS, OWN_QUESTIONS
from sonoedge.calibration.phantom_wording import REPORT as REPORT_QUESTION
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.familiarity import Familiarity
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.model import Model
from sonoedge.runtime.prompt import REPORT, single_choice
from sonoedge.runtime.protocol import Answer, Hint, Token
from sonoedge.runtime.protocol_schema import message_schema
from sonoedge.runtime.server import Server
from sonoedge.runtime.sight import Eye, Sight

StartServer = Callable[..., Server]
MakeSource = Callable[..., Any]
MakeModel = Callable[..., Model]
CHOICES = ("cyst", "oval solid mass", "no lesion")
JAVASCRIPT = Path(__file__).parents[2] / "examples" / "javascript"


@pytest.fixture
def client(start_server: StartServer, make_source: MakeSource) -> Iterator[Client]:
    with Client(start_server(make_source()).requests_endpoint, timeout_s=20) as connected:
        yield connected


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(SonoEdgeError) as refusal:
        action()
    return str(refusal.value)


def hold(server: Server, frames: int = 3) -> None:
    """Wait until a few more frames have been seen."""
    seen = server.telemetry().hinted
    while server.telemetry().hinted < seen + frames:
        time.sleep(0.005)


def test_a_question_about_a_frozen_frame_sees_that_frame(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source()
    server = start_server(source)
    with Client(server.requests_endpoint, timeout_s=20) as client:
        frozen = client.freeze("dark")
        source.brightness = 255
        hold(server)
        old, new = client.answer("Old?", frames=["dark"]), client.answer("New?")
        both = client.answer("Both?", frames=["dark", "live"])
    assert (old.answer, old.frame) == ("亮度 0 %: Old?", frozen.frame)
    assert (new.answer, new.frames) == ("亮度 100 %: New?", ())
    assert new.frame > frozen.frame
    assert old.age_ms > new.age_ms
    assert both.answer == "亮度 50 %: Both?"
    assert [(named.name, named.frame >= frozen.frame) for named in both.frames] == [("dark", True), ("live", True)]


def test_earlier_turns_are_part_of_the_question(client: Client) -> None:
    client.freeze("a")
    first = client.answer("One?", frames=["a"])
    second = client.answer("Two?", frames=["a"], turns=[("One?", first.answer)])
    assert second.answer.startswith("亮度 0 %: One?")
    assert first.answer in second.answer
    assert second.answer.endswith("Two?")


def test_turns_that_are_too_long_are_refused_with_a_way_out(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    server = start_server(make_source(), make_model(context=700))
    with Client(server.requests_endpoint, timeout_s=20) as client:
        message = refused(lambda: client.answer("Now?", turns=[("why " * 100, "so " * 100)] * 2))
        assert "leave earlier turns out" in message
        assert client.answer("Now?").answer == "亮度 0 %: Now?"


def test_every_token_says_what_it_is_about(client: Client) -> None:
    frozen = client.freeze("a")
    *tokens, answer = client.ask("What?", frames=["a"])
    assert tokens
    for token in tokens:
        assert isinstance(token, Token)
        assert (token.frame, token.model, token.intended_use) == (frozen.frame, answer.model, answer.intended_use)
        assert token.age_ms is not None
        assert token.age_ms > 0


def test_frozen_names_are_never_silently_another_frame(client: Client) -> None:
    frame = client.freeze("a").frame
    time.sleep(0.1)
    assert f"'a' is frame {frame} already" in refused(lambda: client.freeze("a"))
    assert "name of the newest" in refused(lambda: client.freeze("live"))
    assert "no frozen frame 'b'" in refused(lambda: client.answer("What?", frames=["b"]))
    for number in range(7):
        assert client.freeze(f"n{number}").name == f"n{number}"
    assert "8 frames are frozen" in refused(lambda: client.freeze("ninth"))
    assert len(client.status().frozen) == 8
    assert client.release("a").frame == frame
    assert "no frozen frame 'a'" in refused(lambda: client.release("a"))
    unnamed = client.freeze()
    assert unnamed.name == str(unnamed.frame)


def test_frozen_frames_are_forgotten_in_the_end(
    start_server: StartServer, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sonoedge.runtime.frozen.KEPT_S", 0.2)
    with Client(start_server(make_source()).requests_endpoint, timeout_s=20) as client:
        client.freeze("a")
        time.sleep(0.3)
        assert client.status().frozen == ()


def test_a_single_choice_is_scored_not_written(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source()
    source.brightness = 128
    with Client(start_server(source).requests_endpoint, timeout_s=20) as client:
        replies = list(client.ask("What is the finding?", choices=CHOICES))
        assert "give two or more, each once" in refused(lambda: client.answer("Which?", choices=["a", "a"]))
        assert "give two or more" in refused(lambda: client.answer("Which?", choices=["a"]))
    (answer,) = replies
    assert isinstance(answer, Answer)
    assert answer.candidates is not None
    assert (answer.answer, answer.tokens, answer.abstain, answer.finish) == (CHOICES[1], 0, False, "stop")
    assert list(answer.candidates) == list(CHOICES)
    assert sum(answer.candidates.values()) == pytest.approx(1)
    assert answer.candidates[CHOICES[1]] > 0.99


def test_a_choice_about_an_unseen_kind_of_image_abstains(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    far = Familiarity(np.full(8, 9, np.float32), np.eye(8, dtype=np.float32), threshold=1)
    with Client(start_server(make_source(), make_model(familiarity=far)).requests_endpoint, timeout_s=20) as client:
        choice, words = client.answer("Which?", choices=CHOICES), client.answer("What?")
    assert (choice.answer, choice.abstain, choice.reason) == ("", True, "unseen kind of image")
    assert choice.candidates is not None
    assert (words.answer, words.abstain, words.reason) == ("亮度 0 %: What?", False, "unseen kind of image")


def test_reports_are_asked_for_as_the_checkpoint_was_taught(client: Client) -> None:
    assert OWN_QUESTIONS[REPORT_QUESTION] == REPORT
    for language, question in REPORT.items():
        *_, report = client.report(language)  # type: ignore[arg-type]
        assert isinstance(report, Answer)
        assert report.answer == f"亮度 0 %: {question}"
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABC", CHOICES, strict=True))
    question = OWN_QUESTIONS[DIAGNOSIS]["en"]
    assert single_choice(question, CHOICES) == f"{question} {options}"


def test_the_picture_is_the_sector_alone(start_server: StartServer, make_source: MakeSource) -> None:
    class Labelled(make_source):  # type: ignore[misc, valid-type]
        """A bright margin, where names are burned in, beside a dark sector."""

        def __iter__(self) -> Iterator[Frame]:
            image = np.full((60, 1000, 3), 255, np.uint8)
            image[10:50, 20:940] = 0
            for frame in super().__iter__():
                yield Frame(image, frame.sequence, frame.captured_ns, None, "test", (20, 10, 940, 50))

    with Client(start_server(Labelled()).requests_endpoint, timeout_s=20) as client:
        picture = client.picture()
        frozen = client.freeze("a")
        kept = client.picture("a")
        assert client.answer("What?").answer == "亮度 0 %: What?"
    assert (picture.width, picture.height) == (800, 35)
    assert (picture.model, picture.intended_use) == ("0123456789abcdef", "Tests only, never a diagnosis.")
    assert picture.age_ms > 0
    assert kept.frame == frozen.frame
    shown = cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    assert shown.shape == (35, 800, 3)
    assert shown.max() < 8


def test_a_flipped_picture_is_turned_back(start_server: StartServer, make_source: MakeSource) -> None:
    class Flipped(make_source):  # type: ignore[misc, valid-type]
        """Bright at its right side, and the feed says that this is the left one."""

        def __iter__(self) -> Iterator[Frame]:
            image = np.zeros((60, 80, 3), np.uint8)
            image[:, 40:] = 255
            for frame in super().__iter__():
                yield Frame(image, frame.sequence, frame.captured_ns, None, "test", flipped=True)

    with Client(start_server(Flipped()).requests_endpoint, timeout_s=20) as client:
        shown = cv2.imdecode(np.frombuffer(client.picture().jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert shown is not None
    assert shown[:, :30].min() > 250
    assert shown[:, 50:].max() < 5


class Poor(Eye):
    """An eye that finds every frame poor, for one reason."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def see(self, frame: Frame) -> Sight:
        return Sight(frame, self._why)


def test_poor_frames_are_reported_instead_of_asked_about(
    start_server: StartServer, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sonoedge.runtime.worker.Eye", lambda flip: Poor("in air"))
    server = start_server(make_source())
    hints = (m for m in listen(server.hints_endpoint, timeout_s=20) if isinstance(m, Hint))
    group = [next(hints) for _ in range(6)]
    assert {hint.hint for hint in group} == {"region", "quality", "finding"}
    assert all((hint.abstain, hint.answer, hint.reason) == (True, None, "poor frame: in air") for hint in group)
    with Client(server.requests_endpoint, timeout_s=20) as client:
        assert "shows nothing to ask about (poor frame: in air)" in refused(lambda: client.answer("What?"))
        assert client.picture().reason == "poor frame: in air"
        telemetry = client.status().telemetry
    assert telemetry.gated == telemetry.hinted > 0
    assert telemetry.abstentions == telemetry.hints == 3 * telemetry.hinted


def test_a_frozen_image_can_be_asked_about_and_says_so(
    start_server: StartServer, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sonoedge.runtime.worker.Eye", lambda flip: Poor("frozen"))
    with Client(start_server(make_source()).requests_endpoint, timeout_s=20) as client:
        answer = client.answer("What?")
    assert (answer.answer, answer.reason) == ("亮度 0 %: What?", "poor frame: frozen")


def test_the_schema_is_told(client: Client, start_server: StartServer) -> None:
    reply = client.schema()
    assert [hint.name for hint in reply.schema.hints] == ["region", "quality", "finding", "kind", "side"]
    assert reply.messages == message_schema()


def test_everything_that_is_said_is_recorded(make_source: MakeSource, make_model: MakeModel) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    server = Server(
        make_model(),
        make_source(),
        bind="tcp://127.0.0.1:*",
        hints_bind="tcp://127.0.0.1:*",
        audit=lambda kind, fields: said.append((kind, dict(fields))),
    )
    server.start()
    while server.telemetry().hinted == 0:
        time.sleep(0.01)
    with Client(server.requests_endpoint, timeout_s=20) as client:
        client.freeze("a")
        answer = client.answer("What?", frames=["a"], turns=[("Before?", "Nothing.")])
        refusal = refused(lambda: client.answer(" "))
    server.stop()
    kinds = [kind for kind, _ in said]
    assert (kinds[0], kinds[-1]) == ("start", "stop")
    assert set(kinds) == {"start", "state", "hint", "hint_until", "freeze", "answer", "refusal", "stop"}
    records: dict[str, dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(dict(said)))
    assert records["answer"]["answer"] == answer.answer
    assert records["answer"]["turns"] == [{"question": "Before?", "answer": "Nothing."}]
    assert records["refusal"]["message"] == refusal
    assert records["stop"]["questions"] == 1
    for kind in ("hint", "answer", "freeze"):
        assert records[kind]["model"] == "0123456789abcdef"
        assert {"frame", "age_ms", "intended_use"} <= records[kind].keys()
    assert len(records["answer"]["seen"]) == 1
    assert {"captured_ns"} == records["answer"]["seen"][0].keys()


def test_a_client_in_javascript_hears_the_same(start_server: StartServer, make_source: MakeSource) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: apt install nodejs")
    if not (JAVASCRIPT / "node_modules" / "zeromq").is_dir():
        pytest.skip("examples/javascript/node_modules is not there: npm install in examples/javascript (Debian: npm)")
    server = start_server(make_source())
    command = [node, "conversation.mjs", server.requests_endpoint, server.hints_endpoint]
    done = subprocess.run(command, cwd=JAVASCRIPT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == in_python(server)


def in_python(server: Server) -> dict[str, object]:
    """The conversation of examples/javascript/conversation.mjs."""
    said: dict[str, object] = {}
    hint = next(m for m in listen(server.hints_endpoint, timeout_s=20) if isinstance(m, Hint))
    said["hint"] = {"hint": hint.hint, "answer": hint.answer, "model": hint.model, "use": hint.intended_use}
    with Client(server.requests_endpoint, timeout_s=20) as client:
        schema = client.schema()
        said["hints"] = [hint.name for hint in schema.schema.hints]
        said["title"] = schema.messages["title"]
        frozen = client.freeze("before")
        said["frozen"] = [named.name for named in client.status().frozen]
        said["again"] = refused(lambda: client.freeze("live"))
        picture = client.picture("before")
        said["picture"] = [picture.width, picture.height, *picture.jpeg[:2], picture.frame == frozen.frame]
        *tokens, first = client.ask("这是什么?", frames=["before"])
        assert isinstance(first, Answer)
        streamed = "".join(token.text for token in tokens if isinstance(token, Token))
        said["first"] = [first.answer, streamed == first.answer, first.frame == frozen.frame, first.finish]
        turns = [("这是什么?", first.answer)]
        said["second"] = client.answer("And now?", frames=["before"], turns=turns).answer
        said["both"] = [named.name for named in client.answer("Which?", frames=["before", "live"]).frames]
        choice = client.answer("What is the finding?", choices=CHOICES)
        assert choice.candidates is not None
        shares = [f"{share:.4f}" for share in choice.candidates.values()]
        said["choice"] = [choice.answer, list(choice.candidates), shares, choice.abstain]
        reports = [list(client.report("en"))[-1], list(client.report("zh"))[-1]]
        said["reports"] = [report.answer for report in reports if isinstance(report, Answer)]
        asking = client.ask("A long question. " * 10)
        said["left"] = "token" if isinstance(next(asking), Token) else "answer"
        asking.close()  # type: ignore[attr-defined]
        said["after"] = client.answer("Still there?", max_tokens=3).finish
        said["released"] = client.release("before").released
        said["gone"] = refused(lambda: client.picture("before"))
    return said
