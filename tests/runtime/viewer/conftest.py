"""A server of the public protocol that says exactly what a test wants, on sockets of its own."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import zmq

from sonoedge.runtime.generate import Finish
from sonoedge.runtime.hints import Text, load_schema
from sonoedge.runtime.protocol import (
    LIVE,
    Answer,
    Ask,
    Broadcast,
    Cancel,
    Error,
    Freeze,
    Frozen,
    Hint,
    Picture,
    PictureRequest,
    Reply,
    Report,
    SchemaReply,
    SchemaRequest,
    State,
    Status,
    StatusRequest,
    Telemetry,
    Token,
    decode_request,
    encode,
)
from sonoedge.runtime.sources import SourceState

MODEL = "3f5c0a" * 10
REGION, FINDING, NO = Text("liver", "肝脏"), Text("yes", "有"), Text("no", "无")
STEP_S = 0.03
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class FakeServer:
    """Publishes a frame about every 30 ms while `state` is live; its attributes may be set at any time."""

    def __init__(self) -> None:
        self.model = MODEL
        self.published_model = MODEL  # of hints
        self.state: SourceState = "live"
        self.detail: str | None = None
        self.name = "phantom"
        self.intended_use = "For research and education only; never a diagnosis."
        self.silent = False  # says nothing at all, as if its machine were gone
        self.reason: str | None = None  # of every hint's abstention
        self.region = REGION
        self.lesion = True
        self.tokens: tuple[str, ...] = ("No ", "lesion ", "is visible.")
        self.token_s = 0.0
        self.requests: list[str] = []
        self.refuses_to_freeze = False
        self.poor: str | None = None  # what is wrong with the picture
        self.reports: list[str] = []  # their languages
        self.frozen: dict[str, tuple[int, float]] = {}  # frame and capture of each
        self.pictures = 0
        self.frame = 0
        self.blind = False  # as if no frame had come yet
        self.size = (480, 360)
        self._captured_s = time.monotonic()
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router, self._pub = self._context.socket(zmq.ROUTER), self._context.socket(zmq.PUB)
        for sock in (self._router, self._pub):
            sock.set(zmq.LINGER, 0)
            sock.bind("tcp://127.0.0.1:*")
        self.endpoint, self.hints_endpoint = (
            sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0") for sock in (self._router, self._pub)
        )
        self._answering: tuple[bytes, Ask | Report, Iterator[str], list[str]] | None = None
        self._next_token_s = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        due_s = telemetry_s = 0.0
        while not self._stop.is_set():
            while self._router.poll(5):
                client, payload = self._router.recv_multipart()
                if not self.silent:
                    self._request(client, payload)
            now_s = time.monotonic()
            if self.silent:
                continue
            if self._answering is not None and now_s >= self._next_token_s:
                self._go_on()
            if now_s >= due_s and self.state == "live":
                due_s = now_s + STEP_S
                self.frame += 1
                self._captured_s = now_s
                for hint in self._hints():
                    self._publish(hint)
            if now_s >= telemetry_s:
                telemetry_s = now_s + 0.3
                self._publish(State(self.state, self.name, self.detail))
                self._publish(self._telemetry())

    def _publish(self, message: Broadcast) -> None:
        self._pub.send(encode(message))

    def _telemetry(self) -> Telemetry:
        return Telemetry(self.frame, 3, self.frame, 0, 2 * self.frame, 1, p50_ms=11.2, p95_ms=17.8, p99_ms=24.4)

    def _hints(self) -> list[Hint]:
        captured_ns = int(self._captured_s * 1e9)

        def hint(name: str, answer: str, text: Text, probability: float, inside: tuple[str, ...]) -> Hint:
            silent = self.reason is not None
            promised = self.reason in (None, "low confidence")
            return Hint(
                hint=name,
                answer=None if silent else answer,
                text=None if silent else text,
                probability=probability,
                abstain=silent,
                reason=self.reason,
                frame=self.frame,
                age_ms=(time.monotonic_ns() - captured_ns) / 1e6,
                model=self.published_model,
                intended_use=self.intended_use,
                captured_ns=captured_ns,
                source=self.name,
                candidates={answer: probability},
                set=inside if promised else (),
                coverage=0.9 if promised else None,
                valid_ms=1000,
            )

        present = [
            hint("region", "liver", self.region, 0.93, ("liver", "kidney")),
            hint("finding", *(("present", FINDING) if self.lesion else ("absent", NO)), 0.81, ()),
        ]
        kind = hint("kind", "cyst", Text("cyst", "囊肿"), 0.77, ())
        return [*present, kind] if self.lesion and self.reason is None else present

    def _request(self, client: bytes, payload: bytes) -> None:
        def reply(message: Reply) -> None:
            self._router.send_multipart([client, encode(message)])

        request = decode_request(payload)
        self.requests.append(type(request).__name__)
        match request:
            case StatusRequest():
                state = State(self.state, self.name, self.detail)
                reply(Status(request.id, self.model, self.intended_use, state, self._telemetry(), 0))
            case SchemaRequest():
                reply(SchemaReply(request.id, load_schema()))
            case PictureRequest():
                if self.blind or self.frame == 0:
                    reply(Error("no frame yet: the source is waiting", request.id))
                    return
                self.pictures += request.name == LIVE
                frame, age_ms = self._about((request.name,))
                jpeg = self._jpeg(frame)
                reply(Picture(request.id, jpeg, frame, age_ms, *self.size, reason=self.poor))
            case Freeze():
                if self.refuses_to_freeze:
                    reply(Error("8 frames are frozen, the most there can be", request.id))
                    return
                name = request.name or ""
                self.frozen.setdefault(name, (self.frame, self._captured_s))
                frame, age_ms = self._about((name,))
                if request.release:
                    del self.frozen[name]
                reply(Frozen(request.id, name, request.release, frame, age_ms, MODEL, self.intended_use))
            case Ask() | Report():
                if isinstance(request, Report):
                    self.reports.append(request.language)
                if self._answering is not None:
                    reply(Error("busy, retry in 400 ms", request.id, 400))
                    return
                self._answering = (client, request, iter(self.tokens), [])
                self._next_token_s = time.monotonic() + self.token_s
            case Cancel():
                if self._answering is not None and self._answering[1].id == request.id:
                    self._end("cancelled")

    def _go_on(self) -> None:
        assert self._answering is not None
        client, ask, tokens, said = self._answering
        token = next(tokens, None)
        if token is None:
            self._end("stop")
            return
        said.append(token)
        self._router.send_multipart(
            [client, encode(Token(ask.id, token, 1, *self._about(ask.frames), MODEL, self.intended_use))]
        )
        self._next_token_s = time.monotonic() + self.token_s

    def _end(self, finish: Finish) -> None:
        assert self._answering is not None
        client, ask, _, said = self._answering
        about = self._about(ask.frames)
        answer = Answer(ask.id, "".join(said), *about, MODEL, self.intended_use, len(said), 90.0, finish)
        self._router.send_multipart([client, encode(answer)])
        self._answering = None

    def _about(self, names: tuple[str, ...]) -> tuple[int, float]:
        """Number and age of a frame by its name."""
        frame, captured_s = self.frozen.get(names[0] if names else LIVE, (self.frame, self._captured_s))
        return frame, (time.monotonic() - captured_s) * 1000

    def _jpeg(self, frame: int) -> bytes:
        """A sector with speckle that moves with the frame."""
        width, height = self.size
        random = np.random.default_rng(frame)
        grey = random.integers(20, 120, (height // 4, width // 4), dtype=np.uint8)
        speckle = cv2.resize(grey, (width, height), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros_like(speckle)
        cv2.ellipse(mask, (width // 2, 0), (height - 4, height - 4), 90, -42, 42, 255, -1)
        center = (width // 2 + int(60 * np.sin(frame / 9)), height // 2)
        cv2.ellipse(speckle, center, (42, 30), 0, 0, 360, 12, -1)
        done, jpeg = cv2.imencode(".jpg", np.where(mask > 0, speckle, 0), [cv2.IMWRITE_JPEG_QUALITY, 80])
        assert done
        return jpeg.tobytes()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A server that says what the test wants."""
    server = FakeServer()
    yield server
    server.stop()


VIEW = """
import sys
from sonoedge.runtime import view
view.run(sys.argv[1], sys.argv[2], 0, as_json=True)
"""


class Viewer(msgspec.Struct, frozen=True):
    """A served page."""

    process: subprocess.Popen[str]
    url: str


@pytest.fixture
def viewer(fake_server: FakeServer) -> Iterator[Viewer]:
    """The viewer of the fake server, in a process of its own."""
    pytest.importorskip("starlette", reason="the extra `viewer` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `viewer` is not installed")
    command = [sys.executable, "-W", "error", "-c", VIEW, fake_server.endpoint, fake_server.hints_endpoint]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield Viewer(process, msgspec.json.decode(process.stdout.readline())["url"])
    process.kill()
    process.communicate()


class Screen:
    """The page as somebody in front of it sees it."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def look(self, state: str) -> None:
        """Wait until the picture is shown as live, frozen or bad."""
        self.page.wait_for_function("state => document.body.dataset.look === state", arg=state)

    def shows(self, selector: str, text: str) -> None:
        """Wait until an element shows the text."""
        script = (
            "([selector, text]) => [...document.querySelectorAll(selector)].some(one => one.textContent.includes(text))"
        )
        self.page.wait_for_function(script, arg=[selector, text])

    def frame(self) -> int:
        """Number of the picture."""
        return int(self.page.get_attribute("#picture", "data-frame"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives Chromium: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def screen(browser: Any, viewer: Viewer) -> Iterator[Screen]:
    """The page at 1024 × 600, in English; a page error or a request to elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1024, "height": 600}, locale="en-US")
    context.set_default_timeout(15_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    page.on("request", lambda asked: None if asked.url.startswith((viewer.url, "about:")) else wrong.append(asked.url))
    page.goto(viewer.url)
    page.wait_for_selector("#picture[data-frame]", state="attached")
    yield Screen(page)
    context.close()
    assert wrong == []
