"""The golden check: a built bundle passes it, and one whose recorded outputs do not fit is not served."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sonoedge.bundle import MANIFEST_FILE, open_bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.manifest import SIGNATURE_FILE
from sonoedge.runtime.golden import GoldenCase, check, load_case
from sonoedge.runtime.model import open_model

CASE = "golden/0.npz"


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Path:
    """The bundle, to be altered."""
    made = Path(shutil.copytree(tiny.bundle, tmp_path / "copy"))
    (made / SIGNATURE_FILE).unlink()  # which would be found wrong first
    return made


def alter(bundle: Path, change: Callable[[GoldenCase], GoldenCase]) -> None:
    """Change a recorded case and its hash in the manifest, as one who knows the format could."""
    changed = change(load_case(bundle / CASE))
    changed.save(bundle / CASE)
    data = (bundle / CASE).read_bytes()
    manifest = msgspec.json.decode((bundle / MANIFEST_FILE).read_bytes())
    manifest["files"][CASE] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (bundle / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))


def test_a_built_bundle_passes_within_its_bound(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    error = check(bundle)
    print("relative error:", error)
    assert error == pytest.approx(tiny.report["golden_error"], rel=0.3)
    assert error < bundle.manifest.golden.bound == tiny.report["golden_bound"]
    assert sum(name.startswith("golden/") for name in bundle.manifest.files) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda case: msgspec.structs.replace(case, logits=case.logits[:, ::-1].copy()),
        lambda case: msgspec.structs.replace(case, logits=case.logits * 3),
        lambda case: msgspec.structs.replace(case, logits=np.full_like(case.logits, np.nan)),
        lambda case: msgspec.structs.replace(case, logits=case.logits[:, :-1].copy()),
        lambda case: msgspec.structs.replace(case, patches=-case.patches),
        lambda case: msgspec.structs.replace(case, positions=case.positions[::-1].copy() * 5),
    ],
    ids=["reversed", "scaled", "nan", "another vocabulary", "another picture", "other positions"],
)
def test_altered_outputs_are_not_served(copy: Path, change: Callable[[GoldenCase], GoldenCase]) -> None:
    alter(copy, change)
    with pytest.raises(SonoEdgeError, match=r"golden/0\.npz: this machine's outputs differ .* is not served"):
        open_model(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda case: msgspec.structs.replace(case, ids=case.ids[:-1]),
        lambda case: msgspec.structs.replace(case, grid=np.array([1, 2, 3])),
        lambda case: msgspec.structs.replace(case, grid=np.array(6)),
        lambda case: msgspec.structs.replace(case, logits=case.logits[0]),
    ],
    ids=["fewer tokens", "another grid", "a number for a grid", "one row"],
)
def test_shapes_that_do_not_fit_are_refused(copy: Path, change: Callable[[GoldenCase], GoldenCase]) -> None:
    alter(copy, change)
    with pytest.raises(SonoEdgeError, match=r"0\.npz is no golden case, its shapes are .*: build the bundle again"):
        check(open_bundle(copy))


def test_a_changed_byte_is_refused_before_anything_runs(copy: Path) -> None:
    data = bytearray((copy / CASE).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / CASE).write_bytes(data)
    with pytest.raises(SonoEdgeError, match=r"golden/0\.npz has changed"):
        open_model(copy)


@pytest.mark.parametrize("length", [0, 10, 2000])
def test_a_file_cut_off_is_refused(copy: Path, length: int) -> None:
    (copy / CASE).write_bytes((copy / CASE).read_bytes()[:length])
    with pytest.raises(SonoEdgeError, match=r"0\.npz is no golden case"):
        load_case(copy / CASE)


def test_a_file_without_an_array_is_refused(copy: Path) -> None:
    np.savez(copy / CASE, ids=np.zeros(3))
    with pytest.raises(SonoEdgeError, match=r"0\.npz is no golden case \('patches"):
        load_case(copy / CASE)


def test_the_verb_verify_repeats_it(tiny: Any, copy: Path, sonoedge: Any) -> None:
    assert sonoedge("verify", tiny.bundle, "--json").status == 0
    alter(copy, lambda case: msgspec.structs.replace(case, logits=-case.logits))
    refused = sonoedge("verify", copy, "--json")
    assert refused.status == 2
    assert "is not served" in refused.err
