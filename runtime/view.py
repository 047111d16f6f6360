"""The verb `view`: a local page with the live sector, its hints and a box for questions."""

import importlib.util
import re
import socket
import sys
import threading

import msgspec
import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.serve import stopped_by_signals
from sonoedge.runtime.viewer.bridge import Bridge
from sonoedge.runtime.viewer.link import Link

HOST = "127.0.0.1"  # nobody logs in to the viewer, so it is for those at this machine only
CONNECTIONS = 64  # of all pages together; more are told to come again
POLL_S = 0.2
END_S = 3.0  # for responses that are under way


def run(endpoint: str, hints_endpoint: str | None, port: int, *, as_json: bool, keys: ClientKeys | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    hints_endpoint: None for the port after the endpoint's. port: 0 for any free one. Raises SonoEdgeError when the
    extra is not installed, the port is taken or an endpoint is wrong.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SonoEdgeError(f"the viewer needs {' and '.join(missing)}: pip install 'sonoedge[viewer]'")
    hints_endpoint = hints_endpoint or next_port(endpoint)
    for where in (endpoint, hints_endpoint):  # a wrong one is told before there is a page
        connect(zmq.DEALER, where, keys).close()
    with _listener(port) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        if as_json:
            print(msgspec.json.encode({"ready": True, "url": url}).decode(), flush=True)
        else:
            print(f"open {url}", flush=True)
            print("Everybody with an account on this machine can open it. Ctrl-C ends.", file=sys.stderr, flush=True)
        _serve(listener, endpoint, hints_endpoint, keys)


def next_port(endpoint: str) -> str:
    """Return where a server with the usual endpoints publishes hints; raises SonoEdgeError when there is no port."""
    match = re.fullmatch(r"(tcp://.+:)(\d{1,5})", endpoint)
    if match is None:
        raise SonoEdgeError(
            f"{endpoint!r} has no port that a next one follows: say with --hints where hints are published"
        )
    return f"{match[1]}{int(match[2]) + 1}"


def _listener(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # from now on, who comes waits until the application is up
    except OSError as error:
        listener.close()
        raise SonoEdgeError(f"port {port} of {HOST} cannot be had ({error.strerror}): give another --port") from error
    return listener


def _serve(listener: socket.socket, endpoint: str, hints_endpoint: str, keys: ClientKeys | None) -> None:
    """Run the application in a thread, so that signals reach the main one, until one comes or the thread ends."""
    import uvicorn

    from sonoedge.runtime.viewer.app import make_app

    stopping = threading.Event()
    failures: list[BaseException] = []
    app = make_app(lambda: Bridge(Link(endpoint, keys), hints_endpoint, keys), stopping, failures.append)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="viewer")
    with stopped_by_signals() as stop:
        thread.start()
        while not failures and thread.is_alive() and not stop.wait(POLL_S):
            pass
        stopping.set()
        server.should_exit = True
        thread.join(END_S)
        if thread.is_alive():
            server.force_exit = True
            thread.join()
    if failures:
        raise failures[0]
