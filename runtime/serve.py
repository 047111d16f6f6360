"""The verb `serve`: play a source through a bundle, publish hints and answer questions until it ends or is stopped."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.audit import AuditLog
from sonoedge.runtime.config import Config, print_config, read_config
from sonoedge.runtime.endpoints import check_endpoint
from sonoedge.runtime.kept_frames import FrameKeeper, KeptFrames, keep_no_frame
from sonoedge.runtime.key_files import server_keys
from sonoedge.runtime.logs import LogLevel, log_to_stderr
from sonoedge.runtime.model import Model, open_model
from sonoedge.runtime.notify import Notifier
from sonoedge.runtime.orientation import Flip
from sonoedge.runtime.server import Server
from sonoedge.runtime.sessions.choose import Backend
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.sources import open_source
from sonoedge.runtime.wire import keep_no_record

POLL_S = 0.2  # how often a signal is looked for
DRAIN_S = 10.0  # from the signal to the end, whatever still hangs

LOG = logging.getLogger(__name__)


def run(
    bundle: Path | None,
    source: str | None,
    bind: str | None,
    hints_bind: str | None,
    once: bool | None,
    fps: float | None,
    as_json: bool,
    backend: Backend | None = None,
    *,
    config: Path | None = None,
    log_level: LogLevel | None = None,
    server_key: Path | None = None,
    allow: Path | None = None,
    trusted: Path | None = None,
    allow_untrusted: bool | None = None,
    audit: Path | None = None,
    keep_frames: Path | None = None,
    flip: Flip | None = None,
    speed: float | None = None,
    step: bool | None = None,
    print_only: bool = False,
) -> None:
    """Serve until the source ends (`once`), Ctrl-C or SIGTERM; raises SonoEdgeError for anything that cannot start.

    config: a TOML file; what is None here is taken from it. print_only: print what would be served, as TOML.
    """
    options = {
        "bundle": None if bundle is None else str(bundle),
        "source": source,
        "bind": bind,
        "hints_bind": hints_bind,
        "once": once,
        "fps": fps,
        "speed": speed,
        "step": step,
        "backend": backend,
        "log_level": log_level,
        "server_key": None if server_key is None else str(server_key),
        "allow": None if allow is None else str(allow),
        "trusted": None if trusted is None else str(trusted),
        "allow_untrusted": allow_untrusted,
        "audit": None if audit is None else str(audit),
        "keep_frames": None if keep_frames is None else str(keep_frames),
        "flip": flip,
    }
    effective = read_config(config, options)
    if print_only:
        sys.stdout.write(print_config(effective))
        return
    serve(effective, as_json)


def serve(config: Config, as_json: bool) -> None:
    """Serve as configured: one ready line, then a summary at the end."""
    bundle, source = _required(config.bundle, "bundle"), _required(config.source, "source")
    log_to_stderr(config.log_level)
    if config.keep_frames is not None and config.audit is None:
        raise SonoEdgeError(f"keep_frames is {config.keep_frames}, and no log says what they are: give --audit too")
    keys = server_keys(*(None if path is None else Path(path) for path in (config.server_key, config.allow)))
    for endpoint in (config.bind, config.hints_bind):  # a wrong one is told before the model takes its time to load
        check_endpoint(endpoint, secured=keys is not None)
    with (
        contextlib.closing(Notifier()) as notifier,
        contextlib.closing(
            open_source(source, once=config.once, fps=config.fps, speed=config.speed, step=config.step)
        ) as feed,
    ):
        model = open_model(
            Path(bundle),
            config.backend,
            trusted=None if config.trusted is None else Path(config.trusted),
            require_signature=not config.allow_untrusted,
        )
        with (
            contextlib.closing(model.session),
            _audited(config) as audit,
            _kept(config, audit) as keep,
            stopped_by_signals() as stop,
        ):
            server = Server(
                model,
                feed,
                bind=config.bind,
                hints_bind=config.hints_bind,
                security=keys,
                audit=keep_no_record if audit is None else audit.record,
                keep=keep,
                flip=config.flip,
                step=config.step,
            )
            server.start()
            try:
                _say_ready(server, model, feed.name, as_json)
                LOG.info("ready: model %s", model.id[:12])
                notifier.ready("ready")
                _watch(server, audit, stop, notifier)
            finally:
                notifier.stopping()
                with _bounded(DRAIN_S):
                    server.stop()
            _say_summary(server, as_json)


def _required(value: str | None, name: str) -> str:
    if value is None:
        option = "BUNDLE" if name == "bundle" else f"--{name}"
        raise SonoEdgeError(f"there is no {name} to serve: give {option}, or {name} in the file of --config")
    return value


def _audited(config: Config) -> contextlib.AbstractContextManager[AuditLog | None]:
    return contextlib.nullcontext() if config.audit is None else AuditLog(Path(config.audit), config.audit_max_bytes)


@contextlib.contextmanager
def _kept(config: Config, audit: AuditLog | None) -> Iterator[Callable[[Sight], Mapping[str, str]]]:
    """What keeps the frames that the audit log is about."""
    if config.keep_frames is None:
        yield keep_no_frame
        return
    assert audit is not None  # checked before the model is loaded
    folder = KeptFrames(Path(config.keep_frames), config.keep_frames_max_bytes, run=audit.head.seq + 1)
    with contextlib.closing(FrameKeeper(folder, audit.record)) as keeper:
        yield keeper.keep


def _watch(server: Server, audit: AuditLog | None, stop: threading.Event, notifier: Notifier) -> None:
    """Wait for the end; tell the supervisor and the log how it goes."""
    said = None
    recording = "writing"
    while not stop.is_set() and not server.wait(POLL_S):
        state = server.state()
        notifier.progress(server.beats)
        if state.state != said:
            said = state.state
            notifier.status(f"source {said}")
            level = logging.WARNING if said in ("lost", "stalled") else logging.INFO
            LOG.log(level, "source %s", said if state.detail is None else f"{said}: {state.detail}")
        if audit is not None and (now := audit.state).state != recording:
            recording = now.state
            notifier.status(f"audit log {recording}")
            LOG.log(logging.INFO if recording == "writing" else logging.ERROR, "audit log: %s", now.detail or recording)


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End the process with status 1 when what is inside takes longer: a supervisor then starts a whole one."""

    def give_up() -> None:
        LOG.error("a thread did not end within %g s: the process is ended", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    print(f"{model.intended_use} Stop with Ctrl-C.", file=sys.stderr, flush=True)


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
