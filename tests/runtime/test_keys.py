"""Keys in files: for their owner only, never overwritten, readable by ZeroMQ programs; and the list of clients."""

import os
import stat
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.auth

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import keys
from sonoedge.runtime.key_files import (
    allow_client,
    allowed_clients,
    client_keys,
    make_pair,
    read_clients,
    read_pair,
    read_public,
    remove_client,
    server_keys,
)


@pytest.mark.parametrize("umask", [0o000, 0o077], ids=["open umask", "strict umask"])
def test_a_pair_is_for_its_owner_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        pair = make_pair(tmp_path / "made" / "server")
        allow_client(tmp_path / "allow", pair.public)
    finally:
        os.umask(before)
    made = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in made] == ["server.key", "server.key_secret"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600, 0o600]
    assert read_pair(made[1]) == pair
    assert zmq.auth.load_certificate(made[1]) == (pair.public.encode(), pair.secret.encode())
    assert zmq.auth.load_certificates(tmp_path / "allow") == {pair.public.encode(): True}
    assert pair.secret not in made[0].read_text()


def test_files_that_pyzmq_made_work_too(tmp_path: Path) -> None:
    public, secret = zmq.auth.create_certificates(str(tmp_path), "theirs")
    Path(secret).chmod(0o600)
    assert read_pair(Path(secret)).public == read_public(public)


def test_a_pair_is_never_overwritten(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "server")
    with pytest.raises(SonoEdgeError, match="never overwritten"):
        make_pair(tmp_path / "server")
    (tmp_path / "server.key_secret").rename(tmp_path / "kept")
    with pytest.raises(SonoEdgeError, match="never overwritten"):
        make_pair(tmp_path / "server")
    assert read_public(str(tmp_path / "server.key")) == pair.public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    make_pair(tmp_path / "server")
    (tmp_path / "server.key_secret").chmod(mode)
    with pytest.raises(SonoEdgeError, match="can be read by others than its owner: run `chmod 600"):
        read_pair(tmp_path / "server.key_secret")


def test_what_is_no_key_is_told(tmp_path: Path) -> None:
    make_pair(tmp_path / "server")
    other = make_pair(tmp_path / "other")
    with pytest.raises(SonoEdgeError, match="holds no secret key"):
        read_pair(tmp_path / "server.key")
    with pytest.raises(SonoEdgeError, match="cannot be read"):
        read_public("nonsense")
    (tmp_path / "empty").write_text("")
    with pytest.raises(SonoEdgeError, match="holds no key"):
        read_public(str(tmp_path / "empty"))
    (tmp_path / "short").write_text('public-key = "abc"')
    with pytest.raises(SonoEdgeError, match="not 40 Z85 characters"):
        read_public(str(tmp_path / "short"))
    (tmp_path / "long").write_bytes(b"#" * 70_000)
    with pytest.raises(SonoEdgeError, match="too long"):
        read_public(str(tmp_path / "long"))
    mixed = tmp_path / "server.key_secret"
    mixed.write_text(mixed.read_text().replace(read_public(str(mixed)), other.public))
    with pytest.raises(SonoEdgeError, match="does not belong"):
        read_pair(mixed)


def test_an_allow_list_takes_lists_and_removes_clients(tmp_path: Path) -> None:
    folder = tmp_path / "allow"
    scanner, tablet = make_pair(tmp_path / "scanner"), make_pair(tmp_path / "tablet")
    assert allow_client(folder, str(tmp_path / "scanner.key")) == "scanner"
    assert allow_client(folder, tablet.public, "room 3") == "room_3"
    assert allowed_clients(folder) == {scanner.public: "scanner", tablet.public: "room_3"}
    with pytest.raises(SonoEdgeError, match="lists that key already, as scanner"):
        allow_client(folder, scanner.public, "again")
    with pytest.raises(SonoEdgeError, match="holds another key"):
        allow_client(folder, make_pair(tmp_path / "third").public, "scanner")
    with pytest.raises(SonoEdgeError, match="is no name for a client"):
        allow_client(folder, read_public(str(tmp_path / "third.key")), "../..")
    remove_client(folder, "room_3")
    remove_client(folder, scanner.public)
    assert allowed_clients(folder) == {}
    with pytest.raises(SonoEdgeError, match="lists no 'scanner'"):
        remove_client(folder, "scanner")
    assert list(folder.iterdir()) == []


def test_a_secret_put_on_the_list_by_mistake_is_not_copied(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "scanner")
    allow_client(tmp_path / "allow", str(tmp_path / "scanner.key_secret"))
    assert pair.secret not in (tmp_path / "allow" / "scanner.key").read_text()


def test_a_damaged_entry_is_told_and_costs_the_others_nothing(tmp_path: Path) -> None:
    good = make_pair(tmp_path / "good")
    allow_client(tmp_path / "allow", good.public, "good")
    (tmp_path / "allow" / "bad.key").write_text("?")
    clients, problems = read_clients(tmp_path / "allow")
    assert clients == {good.public: "good"}
    assert len(problems) == 1
    with pytest.raises(SonoEdgeError, match=r"bad\.key holds no key"):
        allowed_clients(tmp_path / "allow")


def test_both_halves_of_what_a_server_or_a_client_needs(tmp_path: Path) -> None:
    server, client = make_pair(tmp_path / "server"), make_pair(tmp_path / "client")
    secret, allow = tmp_path / "server.key_secret", tmp_path / "allow"
    assert server_keys(None, None) is None
    assert client_keys(None, None) is None
    with pytest.raises(SonoEdgeError, match="an allow-list is missing"):
        server_keys(secret, None)
    with pytest.raises(SonoEdgeError, match="a server key is missing"):
        server_keys(None, allow)
    with pytest.raises(SonoEdgeError, match="is no folder of client keys: run `sonoedge keys allow"):
        server_keys(secret, allow)
    allow_client(allow, client.public)
    made = server_keys(secret, allow)
    assert made is not None
    assert made.pair == server
    for key, server_key, missing in ((tmp_path / "client.key_secret", None, "--server-key"), (None, "x", "--key")):
        with pytest.raises(SonoEdgeError, match=f"^{missing} is missing"):
            client_keys(key, server_key)
    for said in (server.public, str(tmp_path / "server.key")):
        reached = client_keys(tmp_path / "client.key_secret", said)
        assert reached is not None
        assert (reached.pair, reached.server) == (client, server.public)


def test_the_verb_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> dict[str, object]:
        return msgspec.json.decode(capsys.readouterr().out, type=dict[str, object])

    keys.make(tmp_path / "tablet", as_json=True)
    public = said()["public"]
    keys.show(str(tmp_path / "tablet.key_secret"), as_json=True)
    assert said() == {"public": public}
    keys.allow(tmp_path / "allow", str(tmp_path / "tablet.key"), None, as_json=True)
    assert said()["allowed"] == "tablet"
    keys.list_clients(tmp_path / "allow", as_json=True)
    assert said()["clients"] == {"tablet": public}
    keys.list_clients(tmp_path / "allow", as_json=False)
    assert capsys.readouterr().out == f"{public}  tablet\n"
    keys.remove(tmp_path / "allow", "tablet", as_json=True)
    assert said()["removed"] == "tablet"
    keys.make(tmp_path / "maker", as_json=False, signing=True)
    assert f"{tmp_path}/maker.pem: keep it to yourself" in capsys.readouterr().out
    assert stat.S_IMODE((tmp_path / "maker.pem").stat().st_mode) == 0o600
    keys.make(tmp_path / "server", as_json=False)
    out = capsys.readouterr().out
    assert read_pair(tmp_path / "server.key_secret").secret not in out
