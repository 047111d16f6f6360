"""Only the viewer's own page is served: no other site, no name that leads here, no form."""

import pytest

from sonoedge.runtime.viewer.guard import HEADERS, is_loopback, refuses

OWN = {"host": "127.0.0.1:8765", "sec-fetch-site": "same-origin"}
POST = OWN | {"content-type": "application/json", "origin": "http://127.0.0.1:8765"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "127.3.2.1:80", "[::1]:80", "[::1]", "localhost:1"])
def test_the_page_itself_is_served(host: str) -> None:
    assert refuses("GET", {"host": host}) is None


@pytest.mark.parametrize("host", ["", "evil.example", "evil.example:8765", "192.0.2.1:8765", "127.0.0.1.evil.example"])
def test_a_name_that_leads_here_is_refused(host: str) -> None:
    assert "is not this machine" in (refuses("GET", {"host": host}) or "")


@pytest.mark.parametrize(
    "headers",
    [
        POST | {"sec-fetch-site": "cross-site"},
        POST | {"sec-fetch-site": "same-site"},
        POST | {"origin": "http://evil.example"},
        POST | {"origin": "null"},
        POST | {"origin": "http://127.0.0.1:9999"},
        POST | {"content-type": "text/plain"},
        {"host": "127.0.0.1:8765", "origin": "http://127.0.0.1:8765"},
    ],
)
def test_what_another_site_can_make_a_browser_send_is_refused(headers: dict[str, str]) -> None:
    assert refuses("POST", POST) is None
    assert refuses("POST", headers) is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "scanner", ""])
def test_what_others_can_reach_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_the_policy_allows_nothing_but_the_own_files() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in HEADERS["content-security-policy"]
