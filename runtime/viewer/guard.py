"""What every response of the viewer carries, and which requests get one: only those of its own page."""

import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name may lead anywhere
        return False


class Guard:
    """Wraps an ASGI application; refuses what another site, or a name that leads here, makes a browser send."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it with 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = refuses(scope["method"], headers)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
            return
        await send_with_headers({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": refusal.encode()})


def refuses(method: str, headers: Mapping[str, str]) -> str | None:
    """Return why a request is none of the page's; None when it may be."""
    host = headers.get("host", "")
    if not is_loopback(host.rpartition(":")[0] or host if not host.endswith("]") else host):
        return f"the host {host!r} is not this machine: open the address that `sonoedge view` printed"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "the request comes from another site: open the page itself"
    if headers.get("origin", f"http://{host}") != f"http://{host}":
        return "the request comes from another site: open the page itself"
    if method == "POST" and headers.get("content-type") != "application/json":
        return "the request is not application/json: send that"
    return None
