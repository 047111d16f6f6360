"""`sonoedge bench`: how long every stage takes on this machine, and whether the hints keep up with the feed."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from sonoedge.errors import SonoEdgeError
from sonoedge.progress import track
from sonoedge.runtime.client import Client
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.look import Prompter, look_at
from sonoedge.runtime.model import Model, open_model
from sonoedge.runtime.preprocess import crop_to_sector, preprocess
from sonoedge.runtime.protocol import Telemetry
from sonoedge.runtime.server import Server
from sonoedge.runtime.sessions.choose import Backend
from sonoedge.runtime.sources import Source, SourceState, open_source

FPS = 30.0
QUESTIONS = 10
STAGE_RUNS = 30


class MemorySource:
    """Frames made in memory at a fixed rate: what `bench` plays when it is given no source."""

    def __init__(self, fps: float = FPS) -> None:
        self.name, self.fps = "memory", fps
        self.state: SourceState = "live"
        self.detail: str | None = None
        rng = np.random.default_rng(0)
        self._images = [rng.integers(0, 160, (240, 320, 1), np.uint8).repeat(3, axis=2) for _ in range(8)]
        self._closed = False

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames on a fixed grid of times, so that a late frame does not delay the next."""
        began_ns = time.monotonic_ns()
        sequence = 0
        while not self._closed:
            wait_s = (began_ns + sequence * 1e9 / self.fps - time.monotonic_ns()) / 1e9
            if wait_s > 0:
                time.sleep(wait_s)
            image = self._images[sequence % len(self._images)]
            yield Frame(image, sequence, time.monotonic_ns(), None, self.name)
            sequence += 1
        self.state = "ended"

    def close(self) -> None:
        """End the iteration."""
        self._closed = True


class BenchReport(msgspec.Struct, frozen=True):
    """What was measured; milliseconds unless a name says otherwise."""

    model: str
    machine: str
    source: str
    fps: float
    frames: int
    dropped: int
    capture_to_wire_ms: dict[str, float]
    question_ms: dict[str, float]
    stages_ms: dict[str, float]  # medians
    decode_tokens_s: float


def run(bundle: Path, source: str | None, seconds: float, as_json: bool, backend: Backend | None = None) -> None:
    """The verb: measure the bundle on a source, or on frames made in memory, for `seconds`."""
    frame = _first_frame(source)
    model = open_model(bundle, backend)
    with contextlib.closing(model.session), contextlib.closing(_open(source)) as feed:
        stages, tokens_s = _stages(model, frame)
        telemetry, questions = _serve(model, feed, seconds)
    if telemetry.p50_ms is None or telemetry.p95_ms is None or telemetry.p99_ms is None:
        raise SonoEdgeError(f"no frame of {feed.name} got its hints within {seconds} s: give more --seconds")
    report = BenchReport(
        model=model.id,
        machine=f"{platform.machine()}, {platform.processor() or 'processor unknown'}, {platform.system()}",
        source=feed.name,
        fps=feed.fps,
        frames=telemetry.frames,
        dropped=telemetry.dropped,
        capture_to_wire_ms={"p50": telemetry.p50_ms, "p95": telemetry.p95_ms, "p99": telemetry.p99_ms},
        question_ms={"p50": statistics.median(questions), "max": max(questions)},
        stages_ms=stages,
        decode_tokens_s=tokens_s,
    )
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _print(report)


def _open(source: str | None) -> Source:
    return MemorySource() if source is None else open_source(source)


def _first_frame(source: str | None) -> Frame:
    """The first frame of a source that is closed again: a camera can be open only once."""
    feed = _open(source)
    frames = iter(feed)
    frame = next(frames, None)
    feed.close()
    next(frames, None)  # a source lets go of its device when its iteration ends
    if frame is None:
        raise SonoEdgeError(f"{feed.name} gives no frame: check that it is connected")
    return frame


def _serve(model: Model, feed: Source, seconds: float) -> tuple[Telemetry, list[float]]:
    """Hints alone for `seconds`, then questions beside them; gives the counters of the hints and each answer's ms."""
    server = Server(model, feed, bind="tcp://127.0.0.1:*", hints_bind="tcp://127.0.0.1:*")
    server.start()
    try:
        with track("hints on the feed", seconds) as advance, Client(server.requests_endpoint) as client:
            for _ in range(max(1, round(seconds))):
                if server.wait(seconds / max(1, round(seconds))):
                    break
                advance(1)
            telemetry = client.status().telemetry
            questions = []
            for index in range(QUESTIONS):
                began = time.perf_counter()
                client.answer(("Which region is shown?", "Is a lesion visible?", "是否可见病灶？")[index % 3])
                questions.append((time.perf_counter() - began) * 1e3)
    finally:
        server.stop()
    return telemetry, questions


def _stages(model: Model, frame: Frame) -> tuple[dict[str, float], float]:
    """Median milliseconds of each stage on one frame, and tokens a second of decoding."""
    session = model.session

    patches = preprocess(crop_to_sector(frame), session.image)
    look = look_at(session, frame)
    prompt = Prompter(session, model.tokenizer).prefix([look], "en")

    def prefill() -> None:
        session.rewind(0)
        session.extend(prompt.ids, prompt.positions, image_embeds=look.embeds)

    stages: dict[str, Callable[[], object]] = {
        "preprocess": lambda: preprocess(crop_to_sector(frame), session.image),
        "vision": lambda: session.encode_image(patches),
        "prefill of the image": prefill,
        "all hints, prefill included": lambda: model.engine.judge(look),
    }
    medians = {name: _median_ms(stage) for name, stage in stages.items()}
    prefill()
    token = np.array([model.tokenizer.eos], np.int64)
    length = session.length

    def decode() -> None:
        session.extend(token, np.full((3, 1), prompt.next_position, np.int64))
        session.rewind(length)

    medians["decode a token"] = _median_ms(decode)
    session.rewind(0)
    return medians, 1e3 / medians["decode a token"]


def _median_ms(work: Callable[[], object]) -> float:
    samples = []
    for index in range(STAGE_RUNS + 5):
        began = time.perf_counter()
        work()
        if index >= 5:  # the first runs warm caches up
            samples.append((time.perf_counter() - began) * 1e3)
    return statistics.median(samples)


def _print(report: BenchReport) -> None:
    table = Table(title=f"model {report.model[:12]} on {report.source}, {report.fps:g} frames a second")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, value in report.stages_ms.items():
        table.add_row(f"{name}, median", f"{value:.2f}")
    for name, value in report.capture_to_wire_ms.items():
        table.add_row(f"capture to wire, {name}", f"{value:.1f}")
    for name, value in report.question_ms.items():
        table.add_row(f"a question beside the hints, {name}", f"{value:.0f}")
    console = Console(highlight=False)
    console.print(table)
    decoding = f"decoding {report.decode_tokens_s:.0f} tokens a second"
    console.print(f"{report.frames} frames, {report.dropped} dropped, {decoding}")
