"""The verbs of a scanner: serve a feed, ask, watch and view what is said about it, measure it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sonoedge.cli_options import AsJson, Backend, BundlePath, TrustedKeys

scanner = typer.Typer()

Endpoint = Annotated[str, typer.Argument(help="Where `serve` answers, such as tcp://127.0.0.1:5555.")]
HintsEndpoint = Annotated[str, typer.Argument(help="Where `serve` publishes hints.", metavar="HINTS_ENDPOINT")]
ClientKey = Annotated[
    Path | None, typer.Option(help="This client's CURVE keys, for a server that has keys.", show_default=False)
]
ServerKey = Annotated[
    str | None, typer.Option(help="The server's public key, or the file that holds it.", show_default=False)
]
Frames = Annotated[
    list[str] | None,
    typer.Option(help="Name of a frozen frame, or `live`; give it several times.", show_default=False),
]
TimeoutS = Annotated[float, typer.Option(min=0.1, help="Give up after this many seconds of silence.")]


@scanner.command()
def serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder that `build` made; else that of --config.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Video, image folder, DICOM clip, camera (0, /dev/video0), rtsp://…, 'gst: …', igtl://… or ipc://…",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these options; what is said here wins.", show_default=False)
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Endpoint for questions; else tcp://127.0.0.1:5555.", show_default=False)
    ] = None,
    hints_bind: Annotated[
        str | None,
        typer.Option(help="Endpoint that hints are published on; else tcp://127.0.0.1:5556.", show_default=False),
    ] = None,
    once: Annotated[
        bool | None,
        typer.Option("--once", help="End when the file or folder ends, instead of looping.", show_default=False),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, help="Frames a second; else the source's own.", show_default=False)
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Replay a recording this many times as fast.", show_default=False),
    ] = None,
    step: Annotated[
        bool | None,
        typer.Option("--step", help="Replay frame by frame: the next when the last is done with.", show_default=False),
    ] = None,
    backend: Backend = None,
    server_key: Annotated[
        Path | None, typer.Option(help="The server's CURVE keys, to be reached by others.", show_default=False)
    ] = None,
    allow: Annotated[
        Path | None, typer.Option(help="Folder of the clients' public keys; with --server-key.", show_default=False)
    ] = None,
    trusted: TrustedKeys = None,
    allow_untrusted: Annotated[
        bool | None,
        typer.Option("--allow-untrusted", help="Serve a bundle that no trusted key signed.", show_default=False),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Folder for the audit log; else none is kept.", show_default=False)
    ] = None,
    keep_frames: Annotated[
        Path | None, typer.Option(help="Folder for the frames that the audit log is about.", show_default=False)
    ] = None,
    flip: Annotated[
        Literal["auto", "yes", "no"] | None,
        typer.Option(help="Whether left and right are exchanged; else as the feed or its marker says."),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="What is logged to standard error; else warnings.", show_default=False),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what would be served, as TOML, and end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a feed, publish hints about it and answer questions."""
    from sonoedge.runtime import serve

    serve.run(
        bundle,
        source,
        bind,
        hints_bind,
        once,
        fps,
        as_json,
        backend,
        config=config,
        log_level=log_level,
        server_key=server_key,
        allow=allow,
        trusted=trusted,
        allow_untrusted=allow_untrusted,
        audit=audit,
        keep_frames=keep_frames,
        flip=flip,
        speed=speed,
        step=step,
        print_only=print_config,
    )


@scanner.command()
def ask(
    endpoint: Endpoint,
    question: Annotated[str, typer.Argument(help="In English or Chinese.", show_default=False)],
    language: Annotated[
        Literal["en", "zh"] | None, typer.Option(help="Of the system turn; else that before hints.", show_default=False)
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="One of the only answers; give it several times.", show_default=False)
    ] = None,
    frame: Frames = None,
    timeout_s: TimeoutS = 30.0,
    key: ClientKey = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Ask a question about what the scanner sees now, or about frozen frames."""
    from sonoedge.runtime import ask
    from sonoedge.runtime.key_files import client_keys

    ask.run(
        endpoint,
        question,
        language,
        timeout_s,
        as_json=as_json,
        keys=client_keys(key, server_key),
        choices=choice or (),
        frames=frame or (),
    )


@scanner.command()
def report(
    endpoint: Endpoint,
    language: Annotated[Literal["en", "zh"], typer.Option(help="Of the report.")] = "en",
    frame: Frames = None,
    timeout_s: TimeoutS = 30.0,
    key: ClientKey = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Have a report written about what the scanner sees now, or about frozen frames."""
    from sonoedge.runtime import ask
    from sonoedge.runtime.key_files import client_keys

    keys = client_keys(key, server_key)
    ask.run_report(endpoint, language, timeout_s, as_json=as_json, keys=keys, frames=frame or ())


@scanner.command()
def freeze(
    endpoint: Endpoint,
    name: Annotated[str | None, typer.Argument(help="Of the frame; else its number.", show_default=False)] = None,
    release: Annotated[bool, typer.Option("--release", help="Let the frame of that name go.")] = False,
    timeout_s: TimeoutS = 30.0,
    key: ClientKey = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Keep the frame that the scanner sees now, to ask about it later."""
    from sonoedge.runtime import freeze
    from sonoedge.runtime.key_files import client_keys

    freeze.run(endpoint, name, release, timeout_s, as_json=as_json, keys=client_keys(key, server_key))


@scanner.command()
def watch(
    endpoint: HintsEndpoint,
    count: Annotated[int | None, typer.Option(min=1, help="End after this many.", show_default=False)] = None,
    timeout_s: TimeoutS = 30.0,
    key: ClientKey = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Print hints as they are published; with --json, one line each."""
    from sonoedge.runtime import watch
    from sonoedge.runtime.key_files import client_keys

    watch.run(endpoint, count, timeout_s, as_json=as_json, keys=client_keys(key, server_key))


@scanner.command()
def view(
    endpoint: Endpoint,
    hints: Annotated[
        str | None,
        typer.Option(
            metavar="HINTS_ENDPOINT", help="Where it publishes hints; else the next port.", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 5557,
    key: ClientKey = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Serve a local page with the live sector, its hints and a box for questions."""
    from sonoedge.runtime import view
    from sonoedge.runtime.key_files import client_keys

    view.run(endpoint, hints, port, as_json=as_json, keys=client_keys(key, server_key))


@scanner.command()
def bench(
    bundle: BundlePath,
    source: Annotated[
        str | None, typer.Option(help="As for `serve`; else frames made in memory.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 20.0,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency by stage and throughput on this machine."""
    from sonoedge.runtime import bench

    bench.run(bundle, source, seconds, as_json=as_json, backend=backend)
