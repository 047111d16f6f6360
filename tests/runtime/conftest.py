"""Fixtures of the runtime's tests: a small byte-level tokenizer, fake models, running servers, little feeds."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pydicom.data
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sonoedge.bundle import HintCalibration, ImageSpec
from sonoedge.runtime.familiarity import Familiarity
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.frame_gate import FrameGate
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import HintSchema, load_schema
from sonoedge.runtime.model import Model
from sonoedge.runtime.sector.tracker import SectorTracker
from sonoedge.runtime.sector.view import whole
from sonoedge.runtime.server import Server
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.sources import Source
from sonoedge.runtime.tokens import Tokenizer

SMALL = ImageSpec(max_pixels=56 * 56)  # pictures of at most four tokens keep the fake fast
SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer built like Qwen2's, with few merges, its special tokens and one added plain token."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "t"), ("ä", "¹"), ("s", "t")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIALS.split())
    inner.add_tokens([tokenizers.AddedToken("<tool_call>", special=False)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    inner.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The tokenizer as the runtime wraps it."""
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def schema() -> HintSchema:
    """The packaged hint schema."""
    return load_schema()


@pytest.fixture
def session(tokenizer: Tokenizer, schema: HintSchema) -> FakeSession:
    """A fake session that refuses wrong positions, masks and lengths."""
    return FakeSession(tokenizer, schema, image=SMALL)


@pytest.fixture
def make_model(tokenizer: Tokenizer, schema: HintSchema) -> Callable[..., Model]:
    """Make a model on a fake session: `make_model(step_s=0.01, calibration=..., familiarity=...)`."""

    def make(
        *,
        step_s: float = 0.0,
        context: int = 4096,
        calibration: dict[str, HintCalibration] | None = None,
        familiarity: Familiarity | None = None,
    ) -> Model:
        session = FakeSession(tokenizer, schema, step_s=step_s, context=context, image=SMALL)
        engine = HintEngine(session, tokenizer, schema, calibration=calibration, familiarity=familiarity)
        return Model(session, tokenizer, engine, "0123456789abcdef", "Tests only, never a diagnosis.")

    return make


@pytest.fixture(autouse=True)
def plain_eye(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let served shades be seen, which hold no sector, except where the test is of seeing."""
    if request.node.get_closest_marker("sees"):
        return
    monkeypatch.setattr(SectorTracker, "see", lambda _tracker, image, *, still: whole(image.shape))
    monkeypatch.setattr(FrameGate, "judge", lambda _gate, _frame, _view, **_: None)


def grey_frame(brightness: int, sequence: int = 0, size: tuple[int, int] = (60, 80)) -> Frame:
    """A frame of one shade."""
    image = np.full((*size, 3), brightness, np.uint8)
    return Frame(image, sequence, time.monotonic_ns(), None, "test")


@pytest.fixture
def shade() -> Callable[..., Frame]:
    """Make a frame of one shade: `shade(128, sequence=3)`."""
    return grey_frame


class ShadeSource:
    """A live feed whose shade a test can change."""

    def __init__(self, fps: float = 50.0, *, frames: int | None = None, silent: bool = False) -> None:
        self.name = "shade"
        self.fps = fps
        self.state = "waiting"
        self.detail: str | None = None
        self.brightness = 0
        self.size = (60, 80)
        self.silent = silent
        self._frames = frames
        self._closed = False

    def __iter__(self) -> Iterator[Frame]:
        sequence = 0
        while not self._closed and (self._frames is None or sequence < self._frames):
            time.sleep(1 / self.fps)
            if self.silent:
                continue
            self.state = "live"
            frame = grey_frame(self.brightness, sequence, self.size)
            yield frame
            sequence += 1
        self.state = "ended"

    def close(self) -> None:
        self._closed = True


@pytest.fixture
def make_source() -> type[ShadeSource]:
    """Make a feed of one shade: `make_source(fps=100, frames=5)`."""
    return ShadeSource


@pytest.fixture
def start_server(make_model: Callable[..., Model]) -> Iterator[Callable[..., Server]]:
    """Start a server on free loopback ports; it is stopped after the test."""
    servers: list[Server] = []

    def start(source: Source, model: Model | None = None, *, wait_for_frame: bool = True, **options: Any) -> Server:
        server = Server(
            model or make_model(), source, bind="tcp://127.0.0.1:*", hints_bind="tcp://127.0.0.1:*", **options
        )
        server.start()
        servers.append(server)
        until = time.monotonic() + 5
        while wait_for_frame and server.telemetry().hinted == 0 and time.monotonic() < until:
            time.sleep(0.005)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """Write a video whose frame i has shade 10 i: `write_video(frames=5, fps=20)`."""

    def write(name: str = "clip.avi", *, frames: int = 5, fps: float = 20.0) -> Path:
        path = tmp_path / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (64, 48))
        for number in range(frames):
            writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
        writer.release()
        return path

    return write


@pytest.fixture(scope="session")
def clip() -> Path:
    """The SonoSite cardiac clip inside pydicom's wheel: 30 frames, 240x320, YBR, JPEG."""
    return Path(str(pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False)))


@pytest.fixture
def noise() -> Callable[..., npt.NDArray[np.uint8]]:
    """Make a picture of smooth noise: `noise(240, 320, grey=True)`."""

    def make(height: int, width: int, *, grey: bool = False) -> npt.NDArray[np.uint8]:
        random = np.random.default_rng(height * 10000 + width)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if grey:
            image[:] = image[:, :, :1]
        return image

    return make


class Process(msgspec.Struct, frozen=True):
    """A served fake model in a process of its own, and its ready line."""

    popen: subprocess.Popen[str]
    ready: dict[str, str]


@pytest.fixture
def serve_process(tokenizer_file: Path) -> Iterator[Callable[..., Process]]:
    """Run the verb `serve` on a fake model in a process of its own, and wait for its ready line."""
    running: list[subprocess.Popen[str]] = []

    def serve(source: object, *options: str) -> Process:
        script = Path(__file__).with_name("serve_fake.py")
        command = [sys.executable, "-W", "error", str(script), str(tokenizer_file), str(source), *options]
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(popen)
        assert popen.stdout is not None
        line = popen.stdout.readline()
        return Process(popen, msgspec.json.decode(line) if line else {})

    yield serve
    for popen in running:
        popen.kill()
        popen.communicate()
