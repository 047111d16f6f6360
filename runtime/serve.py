"""The verb `serve`: play a source through a bundle, publish hints and answer questions until it ends or is stopped."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from sonoedge.runtime.endpoints import check_endpoint
from sonoedge.runtime.model import Model, open_model
from sonoedge.runtime.server import Server
from sonoedge.runtime.sessions.choose import Backend
from sonoedge.runtime.sources import open_source

POLL_S = 0.2  # how often a signal is looked for


def run(
    bundle: Path,
    source: str,
    bind: str,
    hints_bind: str,
    once: bool,
    fps: float | None,
    as_json: bool,
    backend: Backend | None = None,
) -> None:
    """Serve until the source ends (`once`), Ctrl-C or SIGTERM; raises SonoEdgeError for anything that cannot start."""
    serve(lambda: open_model(bundle, backend), source, bind, hints_bind, once, fps, as_json)


def serve(
    load: Callable[[], Model],
    source: str,
    bind: str,
    hints_bind: str,
    once: bool,
    fps: float | None,
    as_json: bool,
) -> None:
    """Serve the model that `load` returns: one ready line, then a summary at the end."""
    for endpoint in (bind, hints_bind):  # a wrong one is told before the model takes its time to load
        check_endpoint(endpoint)
    with contextlib.closing(open_source(source, once=once, fps=fps)) as feed:
        model = load()
        with contextlib.closing(model.session), stopped_by_signals() as stop:
            server = Server(model, feed, bind=bind, hints_bind=hints_bind)
            server.start()
            try:
                _say_ready(server, model, feed.name, as_json)
                while not stop.is_set() and not server.wait(POLL_S):
                    pass
            finally:
                server.stop()
            _say_summary(server, as_json)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; the second signal acts as usual."""
    stop = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say_ready(server: Server, model: Model, source: str, as_json: bool) -> None:
    bind, hints_bind = server.requests_endpoint, server.hints_endpoint
    if as_json:
        _say({"ready": True, "bind": bind, "hints_bind": hints_bind, "model": model.id, "source": source})
        return
    print(f"ready {bind} hints {hints_bind} model {model.id[:12]} source {source}", flush=True)
    Console(stderr=True, highlight=False).print(f"[dim]{model.intended_use} Stop with Ctrl-C.[/]")


def _say_summary(server: Server, as_json: bool) -> None:
    counts = server.telemetry()
    if as_json:
        _say(msgspec.to_builtins(counts))
        return
    latency = (
        "" if counts.p99_ms is None else f", capture to wire p50 {counts.p50_ms:.1f} ms, p99 {counts.p99_ms:.1f} ms"
    )
    print(
        f"{counts.frames} frames, {counts.dropped} dropped, {counts.hints} hints, {counts.questions} answers{latency}",
        flush=True,
    )


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()
