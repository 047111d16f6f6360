"""The viewer's HTTP application: the page's files and what it asks for, guarded."""

import asyncio
import contextlib
import importlib.resources
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.viewer.bridge import Bridge
from sonoedge.runtime.viewer.guard import App, Guard
from sonoedge.runtime.viewer.page import MAX_BODY_BYTES, Given, Page

KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
REFUSED = {"GET": 503, "POST": 400}

Handler = Callable[[Mapping[str, str], bytes], Awaitable[Given]]


def make_app(
    connect: Callable[[], Bridge], stopping: threading.Event, on_failure: Callable[[BaseException], None]
) -> App:
    """Return the ASGI application.

    `connect` makes the bridge on the application's loop, `on_failure` gets what broke the bridge, `stopping` ends
    responses that have no end of their own.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    pages: list[Page] = []  # the one page, once the loop runs

    def route(path: str, choose: Callable[[Page], Handler], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                given = await choose(pages[0])(request.query_params, await _body(request.stream()))
            except SonoEdgeError as error:
                given = Given(str(error).encode(), REFUSED[method])
            if isinstance(given.body, bytes):
                return Response(given.body, given.status, given.headers, given.kind)
            return StreamingResponse(given.body, given.status, given.headers, given.kind)

        return Route(path, endpoint, methods=[method])

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        bridge = connect()
        pages.append(Page(bridge, stopping))
        running = asyncio.create_task(bridge.run())
        running.add_done_callback(report)
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])

    routes = [
        *(route(path, _give(given)) for path, given in _files().items()),
        route("/events", lambda page: page.events),
        route("/picture", lambda page: page.picture),
        route("/ask", lambda page: page.ask, "POST"),
        route("/cancel", lambda page: page.cancel, "POST"),
        route("/freeze", lambda page: page.freeze, "POST"),
    ]
    return Guard(Starlette(routes=routes, lifespan=lifespan))


def _files() -> dict[str, Given]:
    """Read the page's files, by their path in the browser."""
    folder = importlib.resources.files("sonoedge.runtime.viewer") / "static"
    found = {}
    for file in folder.iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        path = "/" if file.name == "index.html" else f"/{file.name}"
        found[path] = Given(file.read_bytes(), kind=KINDS[suffix])
    return found


def _give(given: Given) -> Callable[[Page], Handler]:
    async def handler(_query: Mapping[str, str], _body: bytes) -> Given:
        return given

    return lambda _page: handler


async def _body(stream: AsyncIterator[bytes]) -> bytes:
    """Read a request's body, but not much more of it than is allowed."""
    body = b""
    async for piece in stream:
        body += piece
        if len(body) > MAX_BODY_BYTES:
            break
    return body
