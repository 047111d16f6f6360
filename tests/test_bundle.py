"""A bundle is either whole and unchanged or refused with the name of the file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sonoedge.bundle import FORMAT_VERSION, BundleWriter, Contents, Graph, open_bundle
from sonoedge.errors import SonoEdgeError


def test_what_is_written_is_what_is_read(small_bundle: Path, contents: Contents) -> None:
    bundle = open_bundle(small_bundle)
    manifest = bundle.manifest
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.decoder == contents.decoder
    assert manifest.hint_calibration == contents.hint_calibration
    assert manifest.created.utcoffset() is not None
    assert len(manifest.model.id) == 64
    assert bundle.graph("decoder", "ort").read_bytes() == b"decoder"
    assert bundle.path("tokenizer.json").read_text() == "{}"
    with pytest.raises(SonoEdgeError, match=r"no vision graph in the formulation qdq"):
        bundle.graph("vision", "qdq")
    with pytest.raises(SonoEdgeError, match=r"lists no familiarity\.npz"):
        bundle.path("familiarity.npz")


def test_model_id_is_the_weights_and_nothing_else(small_bundle: Path, contents: Contents, tmp_path: Path) -> None:
    ids = {"same": open_bundle(small_bundle).manifest.model.id}
    changes = {"tokenizer": ("tokenizer.json", b"other"), "weights": ("graphs/decoder.onnx.data", b"other")}
    for change, (name, content) in changes.items():
        with BundleWriter(tmp_path / change) as writer:
            for path in sorted(p for p in small_bundle.rglob("*") if p.is_file() and p.name != "manifest.json"):
                relative = path.relative_to(small_bundle).as_posix()
                writer.add(relative).write_bytes(content if relative == name else path.read_bytes())
            ids[change] = writer.commit(contents).model.id
    assert ids["tokenizer"] == ids["same"]
    assert ids["weights"] != ids["same"]


def test_a_link_to_a_bundle_is_the_bundle(small_bundle: Path) -> None:
    link = small_bundle.parent / "current"
    link.symlink_to(small_bundle.name)
    assert open_bundle(link).root == small_bundle.resolve()


def test_engines_are_outside_the_list(small_bundle: Path) -> None:
    engines = small_bundle / "engines" / "jetson-orin-nano-8gb"
    engines.mkdir(parents=True)
    (engines / "decoder.plan").write_bytes(b"made on the device")
    open_bundle(small_bundle)


def _edit_manifest(bundle: Path, edit: Callable[[dict[str, object]], object]) -> None:
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=dict[str, object])
    edit(manifest)
    (bundle / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _replace_by_link(path: Path) -> None:
    outside = path.parent.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def _list_file(name: str) -> Callable[[Path], None]:
    entry = {"sha256": "0" * 64, "bytes": 1}
    return lambda b: _edit_manifest(b, lambda m: m.update(files={**m["files"], name: entry}))  # type: ignore[dict-item]


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed byte": (lambda b: _flip(b / "graphs/decoder.onnx.data"), r"graphs/decoder\.onnx\.data has changed"),
    "longer file": (lambda b: (b / "tokenizer.json").write_text("{ }"), r"tokenizer\.json is 3 bytes long, not 2"),
    "missing file": (lambda b: (b / "golden/inputs.npz").unlink(), r"golden/inputs\.npz is missing"),
    "unlisted file": (lambda b: (b / "graphs/more.onnx").write_text("x"), r"graphs/more\.onnx is not listed"),
    "linked file": (lambda b: _replace_by_link(b / "graphs/vision.onnx"), r"graphs/vision\.onnx is a link"),
    "linked folder": (lambda b: (b / "more").symlink_to("/"), r"more is a link"),
    "linked engines": (lambda b: (b / "engines").symlink_to("/"), r"engines is a link"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), r"is not a bundle, it has no manifest\.json"),
    "no JSON": (lambda b: (b / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
    "truncated manifest": (
        lambda b: (b / "manifest.json").write_bytes((b / "manifest.json").read_bytes()[:200]),
        r"manifest\.json cannot be read",
    ),
    "newer format": (
        lambda b: _edit_manifest(b, lambda m: m.update(format_version=FORMAT_VERSION + 1, something_new=1)),
        r"manifest\.json has format_version 2 .* install a newer SonoEdge",
    ),
    "unknown key": (lambda b: _edit_manifest(b, lambda m: m.update(colour="red")), r"manifest\.json .*colour"),
    "wrong type": (lambda b: _edit_manifest(b, lambda m: m.update(profile=3)), r"manifest\.json .*\$\.profile"),
    "missing key": (lambda b: _edit_manifest(b, lambda m: m.pop("golden")), r"manifest\.json .*golden"),
    "other model id": (
        lambda b: _edit_manifest(b, lambda m: m["model"].update(id="0" * 64)),  # type: ignore[attr-defined]
        r"manifest\.json gives model\.id 0",
    ),
    "graph not listed": (
        lambda b: _edit_manifest(b, lambda m: m["graphs"][0].update(path="graphs/x.onnx")),  # type: ignore[index]
        r"manifest\.json names graphs/x\.onnx",
    ),
    "traversal": (_list_file("../secret"), r"'\.\./secret' is not a plain path"),
    "traversal in the middle": (_list_file("graphs/../../x"), r"'graphs/\.\./\.\./x' is not a plain path"),
    "absolute path": (_list_file("/etc/passwd"), r"'/etc/passwd' is not a plain path"),
    "backslash": (_list_file("..\\secret"), r"is not a plain path"),
    "dot": (_list_file("./tokenizer.json"), r"is not a plain path"),
    "empty name": (_list_file(""), r"'' is not a plain path"),
    "manifest lists itself": (_list_file("manifest.json"), r"'manifest\.json' cannot be among the files"),
    "manifest lists an engine": (_list_file("engines/p/x.plan"), r"'engines/p/x\.plan' cannot be among the files"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_tampering_is_refused_with_the_name_of_the_file(small_bundle: Path, case: str) -> None:
    tamper, message = TAMPERING[case]
    tamper(small_bundle)
    with pytest.raises(SonoEdgeError, match=message) as refused:
        open_bundle(small_bundle)
    assert str(small_bundle) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_folder_is_no_bundle(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SonoEdgeError, match=r"is not a bundle, no such folder: make one with `sonoedge build`"):
        open_bundle(tmp_path / name)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), BundleWriter(tmp_path / "made" / "for" / "bundle") as writer:
        writer.add("graphs/vision.onnx").write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_block_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add("tokenizer.json").write_text("{}")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"the disk is full: free space"), BundleWriter(tmp_path / "b") as writer:
        writer.add("tokenizer.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_out_is_left_alone(tmp_path: Path, contents: Contents) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(SonoEdgeError, match=r"bundle exists: remove it"), BundleWriter(out):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(SonoEdgeError, match=r"file exists: remove it"), BundleWriter(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file"]
    assert (out / "precious").exists()


def test_an_out_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(SonoEdgeError, match=r"cannot be written \(Not a directory\)"),
        BundleWriter(tmp_path / "file/b"),
    ):
        pass


def test_an_empty_folder_becomes_the_bundle(tmp_path: Path, contents: Contents) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    with BundleWriter(out) as writer:
        for name in ("graphs/vision.onnx", "graphs/decoder.onnx", "golden/inputs.npz"):
            writer.add(name).write_bytes(b"x")
        writer.commit(contents)
    open_bundle(out)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_contents_that_name_what_is_not_there_are_refused(tmp_path: Path, contents: Contents) -> None:
    wrong = msgspec.structs.replace(
        contents, graphs=(Graph(purpose="vision", formulation="ort", path="graphs/none.onnx"),)
    )
    with pytest.raises(SonoEdgeError, match=r"names graphs/none\.onnx"), BundleWriter(tmp_path / "bundle") as writer:
        writer.add("golden/inputs.npz").write_bytes(b"x")
        writer.commit(wrong)
    with pytest.raises(SonoEdgeError, match=r"tokenizer\.json was announced"), BundleWriter(tmp_path / "b") as writer:
        writer.add("tokenizer.json")
        writer.commit(contents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "", "manifest.json", "engines/x.plan"])
def test_a_name_outside_the_bundle_cannot_be_added(tmp_path: Path, name: str) -> None:
    with pytest.raises(SonoEdgeError, match=r"(plain path|name is taken)"), BundleWriter(tmp_path / "b") as writer:
        writer.add(name)
