"""A bundle is vouched for by a key that the machine trusts, or it is refused in one sentence."""

import contextlib
import os
import shutil
import stat
import subprocess
from base64 import b64decode
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonoedge import signing
from sonoedge.bundle import BundleWriter, open_bundle
from sonoedge.development_key import sign_for_this_account
from sonoedge.errors import SonoEdgeError
from sonoedge.signing import Signature, make_signing_key, read_signer, sign_manifest
from sonoedge.trust import trusted_keys


class Keys(msgspec.Struct, frozen=True):
    """A maker whose key is trusted, and somebody else."""

    maker: Path
    stranger: Path
    trusted: Path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    for name in ("maker", "stranger"):
        make_signing_key(tmp_path / "keys" / name)
    (tmp_path / "trusted").mkdir()
    shutil.copy(tmp_path / "keys" / "maker.pub", tmp_path / "trusted" / "device-maker.pub")
    return Keys(tmp_path / "keys" / "maker.pem", tmp_path / "keys" / "stranger.pem", tmp_path / "trusted")


def test_a_signed_bundle_says_by_whom(small_bundle: Path, keys: Keys) -> None:
    before = (small_bundle / "manifest.json").read_bytes()
    signature = sign_manifest(small_bundle, keys.maker)
    bundle = open_bundle(small_bundle, trusted=keys.trusted, require_signature=True)
    assert (bundle.signer.state, bundle.signer.name, bundle.signer.key) == ("trusted", "device-maker", signature.key)
    assert (small_bundle / "manifest.json").read_bytes() == before
    assert open_bundle(small_bundle).signer.state == "untrusted"  # nobody is trusted by default
    assert not list(small_bundle.parent.glob(".*partial"))


def test_what_this_account_builds_it_trusts_and_no_other_account_does(
    small_bundle: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    sign_for_this_account(small_bundle)
    secret = tmp_path / "mine" / "sonoedge" / "this-account.pem"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    first = secret.read_bytes()
    sign_for_this_account(small_bundle)  # with the same key
    assert secret.read_bytes() == first
    assert open_bundle(small_bundle, require_signature=True).signer.name == "this-account"
    with pytest.raises(SonoEdgeError, match="not among the trusted ones"):  # a folder that is named is all there is
        open_bundle(small_bundle, trusted=keys.trusted, require_signature=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "theirs"))
    with pytest.raises(SonoEdgeError, match="not among the trusted ones"):
        open_bundle(small_bundle, require_signature=True)


def test_an_account_that_can_keep_no_key_is_told_so(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(SonoEdgeError, match=r"this-account\.pem cannot be made .* `sonoedge sign`"):
        sign_for_this_account(small_bundle)
    assert not (small_bundle / "manifest.json.sig").exists()


def test_unsigned_and_untrusted_bundles_open_only_where_allowed(small_bundle: Path, keys: Keys) -> None:
    assert open_bundle(small_bundle, trusted=keys.trusted).signer.state == "unsigned"
    with pytest.raises(SonoEdgeError, match=r"the bundle is signed by nobody: sign it .* \(allow_untrusted = true\)"):
        open_bundle(small_bundle, trusted=keys.trusted, require_signature=True)
    sign_manifest(small_bundle, keys.stranger)
    assert open_bundle(small_bundle, trusted=keys.trusted).signer.state == "untrusted"
    for trusted in (keys.trusted, keys.trusted / "absent", None):
        with pytest.raises(SonoEdgeError, match="not among the trusted ones"):
            open_bundle(small_bundle, trusted=trusted, require_signature=True)


def test_a_refused_bundle_is_refused_before_its_files_are_read(
    small_bundle: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sonoedge.bundle._check_file", lambda *_: pytest.fail("read a file of an untrusted bundle"))
    with pytest.raises(SonoEdgeError, match="signed by nobody"):
        open_bundle(small_bundle, trusted=keys.trusted, require_signature=True)


def test_a_signature_does_not_survive_a_changed_manifest(small_bundle: Path, keys: Keys) -> None:
    sign_manifest(small_bundle, keys.maker)
    manifest = small_bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"never a diagnosis", b"surely a diagnosis") + b" ")
    for require in (False, True):  # a signature that is there must hold, asked for or not
        with pytest.raises(SonoEdgeError, match=r"manifest\.json\.sig does not belong to this manifest\.json"):
            open_bundle(small_bundle, trusted=keys.trusted, require_signature=require)


def test_a_signature_is_not_carried_over_to_another_bundle(small_bundle: Path, keys: Keys, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_bundle, other)
    manifest = msgspec.json.decode((other / "manifest.json").read_bytes())
    manifest["intended_use"] = "Something else."
    (other / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    open_bundle(other)
    sign_manifest(small_bundle, keys.maker)
    shutil.copy(small_bundle / "manifest.json.sig", other / "manifest.json.sig")
    with pytest.raises(SonoEdgeError, match="does not belong"):
        open_bundle(other, trusted=keys.trusted)


def test_the_signature_file_is_the_only_one_outside_the_list(small_bundle: Path, keys: Keys) -> None:
    sign_manifest(small_bundle, keys.maker)
    (small_bundle / "graphs" / "manifest.json.sig").write_text("{}")
    with pytest.raises(SonoEdgeError, match=r"graphs/manifest\.json\.sig is not listed"):
        open_bundle(small_bundle, trusted=keys.trusted)
    (small_bundle / "graphs" / "manifest.json.sig").unlink()
    kept = small_bundle.parent / "elsewhere.sig"
    (small_bundle / "manifest.json.sig").rename(kept)
    (small_bundle / "manifest.json.sig").symlink_to(kept)
    with pytest.raises(SonoEdgeError, match=r"manifest\.json\.sig is a link"):
        open_bundle(small_bundle, trusted=keys.trusted)


def test_a_bundle_cannot_list_a_file_by_the_name_of_the_signature(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer, pytest.raises(SonoEdgeError, match="the name is taken"):
        writer.add("manifest.json.sig")


def test_signing_again_replaces_what_was_there(small_bundle: Path, keys: Keys) -> None:
    (small_bundle / "manifest.json.sig").write_text("damaged")
    with pytest.raises(SonoEdgeError, match="cannot be read"):
        open_bundle(small_bundle)
    signing.run(small_bundle, keys.stranger, as_json=True)
    signing.run(small_bundle, keys.maker, as_json=False)
    assert open_bundle(small_bundle, trusted=keys.trusted, require_signature=True).signer.name == "device-maker"


def test_a_damaged_bundle_is_not_signed(small_bundle: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    (small_bundle / "graphs" / "vision.onnx").write_bytes(b"VISION")
    with pytest.raises(SonoEdgeError, match=r"graphs/vision\.onnx has changed"):
        signing.run(small_bundle, keys.maker, as_json=False)
    assert not (small_bundle / "manifest.json.sig").exists()


def test_secret_keys_are_for_their_owner_only_and_never_overwritten(keys: Keys, small_bundle: Path) -> None:
    assert stat.S_IMODE(keys.maker.stat().st_mode) == 0o600
    with pytest.raises(SonoEdgeError, match="never overwritten"):
        make_signing_key(keys.maker.with_suffix(""))
    keys.maker.chmod(0o640)
    with pytest.raises(SonoEdgeError, match="chmod 600"):
        sign_manifest(small_bundle, keys.maker)


def test_what_is_no_key_is_told(keys: Keys, small_bundle: Path, tmp_path: Path) -> None:
    for name, content in {"text": b"hello", "public": keys.maker.with_suffix(".pub").read_bytes()}.items():
        path = tmp_path / name
        path.touch(0o600)
        path.write_bytes(content)
        with pytest.raises(SonoEdgeError, match="no secret key that can be read without a password"):
            sign_manifest(small_bundle, path)
    with pytest.raises(SonoEdgeError, match="cannot be read"):
        sign_manifest(small_bundle, tmp_path / "absent")
    (keys.trusted / "junk.pub").write_bytes(b"junk")
    with pytest.raises(SonoEdgeError, match=r"junk\.pub holds no public key"):
        trusted_keys(keys.trusted)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl (Debian package: openssl)")
def test_keys_and_signatures_are_those_of_openssl(small_bundle: Path, keys: Keys, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(theirs)], check=True)
    theirs.chmod(0o600)
    sign_manifest(small_bundle, theirs)
    public = keys.trusted / "theirs.pub"
    subprocess.run(["openssl", "pkey", "-in", str(theirs), "-pubout", "-out", str(public)], check=True)
    assert open_bundle(small_bundle, trusted=keys.trusted, require_signature=True).signer.name == "theirs"
    written = msgspec.json.decode((small_bundle / "manifest.json.sig").read_bytes(), type=Signature)
    (tmp_path / "raw").write_bytes(b64decode(written.signature))
    manifest = str(small_bundle / "manifest.json")
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    subprocess.run([*verify, "-in", manifest, "-sigfile", str(tmp_path / "raw")], check=True, capture_output=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_the_signature_file_is_noticed(data: st.DataObject, small_bundle: Path, keys: Keys) -> None:
    """It is refused, or it is still the same signature by the same key (such as changed white space)."""
    sign_manifest(small_bundle, keys.maker)
    manifest = (small_bundle / "manifest.json").read_bytes()
    path = small_bundle / "manifest.json.sig"
    good, content = read_signer(small_bundle, manifest, trusted_keys(keys.trusted)), bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(SonoEdgeError):
        assert read_signer(small_bundle, manifest, trusted_keys(keys.trusted)) == good


def test_a_signature_file_of_any_size_is_bounded(small_bundle: Path) -> None:
    with (small_bundle / "manifest.json.sig").open("wb") as file:
        os.ftruncate(file.fileno(), 10**9)
    with pytest.raises(SonoEdgeError, match="too long"):
        open_bundle(small_bundle)
