"""The verb `view`: what it refuses, how it ends, and that a slow reader never gets a backlog."""

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import view
from sonoedge.runtime.key_files import allow_client, make_pair

NOWHERE = "tcp://127.0.0.1:9", "tcp://127.0.0.1:9"
PAGE = Path(view.__file__).parent / "viewer" / "static"


def get(url: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response, response.read()


def post(url: str, path: str, body: object, kind: str = "application/json") -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        connection.request("POST", path, msgspec.json.encode(body), {"content-type": kind})
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [
        (("nonsense", None), "'nonsense' has no port that a next one follows.*--hints"),
        (("ipc:///run/sonoedge", None), "has no port that a next one follows.*--hints"),
        (("nonsense", NOWHERE[1]), "'nonsense' is no endpoint"),
        ((NOWHERE[0], "nonsense"), "'nonsense' is no endpoint"),
    ],
)
def test_a_wrong_endpoint_is_told_before_there_is_a_page(endpoints: tuple[str, str | None], message: str) -> None:
    with pytest.raises(SonoEdgeError, match=message):
        view.run(*endpoints, 0, as_json=True)


def test_hints_are_published_beside_the_endpoint() -> None:
    assert view.next_port("tcp://127.0.0.1:5555") == "tcp://127.0.0.1:5556"
    assert view.next_port("tcp://[::1]:7000") == "tcp://[::1]:7001"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SonoEdgeError, match=f"port {port} of 127.0.0.1 cannot be had.*--port"):
            view.run(*NOWHERE, port, as_json=True)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SonoEdgeError, match=r"starlette and uvicorn: pip install 'sonoedge\[viewer\]'"):
        view.run(*NOWHERE, 0, as_json=True)


def test_importing_it_needs_no_part_of_the_extra() -> None:
    blocked = "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None"
    modules = [file.stem for file in sorted(PAGE.parent.glob("*.py")) if file.stem != "__init__"]
    code = f"{blocked}; import sonoedge.runtime.view; from sonoedge.runtime.viewer import {', '.join(modules)}"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_over_curve_it_needs_a_key_on_the_list(serve_process: Any, clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra `viewer` is not installed")
    for name in ("server", "listed", "stranger"):
        make_pair(tmp_path / name)
    allow_client(tmp_path / "allow", str(tmp_path / "listed.key"))
    secured = ("--server-key", tmp_path / "server.key_secret", "--allow", tmp_path / "allow")
    ready = serve_process(clip, *map(str, secured)).ready

    @contextlib.contextmanager
    def viewed(name: str) -> Iterator[str]:
        endpoints = ready["bind"], "--hints", ready["hints_bind"]
        command = [sys.executable, "-W", "error", "-m", "sonoedge", "view", *endpoints, "--port", "0", "--json"]
        command += ["--server-key", str(tmp_path / "server.key"), "--key", str(tmp_path / f"{name}.key_secret")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield msgspec.json.decode(process.stdout.readline())["url"]
            finally:
                process.terminate()

    with viewed("listed") as url:
        end = time.monotonic() + 10  # to shake hands
        while (got := get(url, "/picture"))[0].status != 200:
            assert time.monotonic() < end, got[1]
        assert got[1].startswith(b"\xff\xd8")
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=20) as page:
            page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while b"event: hint" not in received:
                received += page.recv(65536)
    with viewed("stranger") as url:
        response, said = get(url, "/picture")
        assert (response.status, b"correct endpoint or keys" in said) == (503, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly_with_a_page_open(viewer: Any, number: signal.Signals) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(viewer.url).port), timeout=20) as page:
        page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in page.recv(4096)
        began = time.monotonic()
        viewer.process.send_signal(number)
        out, err = viewer.process.communicate(timeout=30)
        assert (viewer.process.returncode, out, err) == (0, "", "")
        assert time.monotonic() - began < 8


def test_every_response_carries_the_policy_and_a_foreign_host_gets_none(viewer: Any) -> None:
    for path in ("/", "/main.js", "/picture", "/nothing"):
        response, _ = get(viewer.url, path)
        assert "default-src 'none'" in (response.getheader("content-security-policy") or "")
        assert response.getheader("x-content-type-options") == "nosniff"
    response, body = get(viewer.url, "/picture", host="evil.example")
    assert response.status == 403
    assert b"\xff\xd8" not in body


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in PAGE.iterdir():
        text = file.read_text()
        outside = re.findall(r"https?://[^\s\"')]+", text)
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, file.name
        for unsafe in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "style=",
        ):
            assert unsafe not in text, f"{file.name}: {unsafe}"
        assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=", text), file.name


def test_questions_that_are_wrong_are_refused(viewer: Any) -> None:
    assert post(viewer.url, "/ask", {"kind": "ask", "id": "1", "question": "why?"}, "text/plain")[0] == 403
    status, body = post(viewer.url, "/ask", {"kind": "ask", "id": "1", "question": ""})
    assert (status, b"question" in body) == (400, True)
    assert post(viewer.url, "/ask", {"kind": "shell", "id": "1"})[0] == 400
    assert post(viewer.url, "/ask", {"kind": "ask", "id": "1", "question": "a" * 100_000})[0] == 400
    assert get(viewer.url, "/ask")[0].status == 405
    status, body = post(viewer.url, "/ask", {"kind": "ask", "id": "1", "question": "Is a lesion visible?"})
    lines = [msgspec.json.decode(line) for line in body.splitlines()]
    assert [line["type"] for line in lines] == ["token", "token", "token", "answer"]
    assert lines[-1]["captured_ms"] <= lines[-1]["now_ms"]


def test_a_page_that_goes_away_cancels_its_question(viewer: Any, fake_server: Any) -> None:
    fake_server.tokens, fake_server.token_s = ("on ",) * 1000, 0.02
    body = msgspec.json.encode({"kind": "ask", "id": "1", "question": "Go on"})
    head = "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", urlsplit(viewer.url).port), timeout=20) as page:
        page.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in page.recv(4096)
    end = time.monotonic() + 10
    while "Cancel" not in fake_server.requests:
        assert time.monotonic() < end, "the question goes on without anybody to read it"
        time.sleep(0.05)


def test_a_page_that_reads_slowly_gets_the_newest_and_no_backlog(viewer: Any, fake_server: Any) -> None:
    with socket.socket() as page:
        page.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        page.settimeout(20)
        page.connect(("127.0.0.1", urlsplit(viewer.url).port))
        page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = resident_kb(viewer.process.pid)
        time.sleep(6.0)  # 200 frames go by
        behind = fake_server.frame
        received = b""
        while (frames := [int(one) for one in re.findall(rb'"frame":(\d+)', received)]) == [] or frames[-1] < behind:
            received += page.recv(65536)
            assert len(received) < 8_000_000
        assert resident_kb(viewer.process.pid) - before < 20_000
        assert frames[-1] >= behind


def resident_kb(pid: int) -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])
