"""`sonoedge evaluate` on a checkpoint and on a bundle, and the packaged checkpoint's own numbers."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.export import train_demo
from sonoedge.export.evaluate import open_model
from sonoedge.export.models.loading import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = {"region", "quality", "finding", "kind", "side"}


@pytest.mark.parametrize("which", ["checkpoint", "bundle"])
def test_accuracy_by_question_and_stratum(tiny: Any, sonoedge: Any, which: str) -> None:
    ran = sonoedge("evaluate", getattr(tiny, which), "--frames", 12, "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert report["frames"] == 12
    accuracy = report["accuracy"]
    assert set(accuracy) == QUESTIONS | {"overall"}
    assert all(0 <= value <= 1 for value in accuracy.values())
    assert accuracy["overall"] == pytest.approx(sum(accuracy[name] for name in QUESTIONS) / 5)
    assert set(report["strata"]) == {"good frames", "poor frames", "small lesions", "large lesions"}


def test_a_table(tiny: Any, sonoedge: Any) -> None:
    ran = sonoedge("evaluate", tiny.bundle, "--frames", 4)
    assert ran.status == 0, ran.err
    assert "bundle: 4 fresh phantoms" in ran.out
    assert "overall" in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "/nowhere does not exist"),
        (["{bundle}", "--data", "cases.json"], "--data 'cases.json' does not exist: name a conversation file"),
        (["{bundle}", "--against", "/nowhere"], "/nowhere does not exist"),
        (["{bundle}", "--out", "{bundle}"], "exists and is not an empty folder"),
        (["{bundle}", "--frames", "0"], "--frames': Input should be greater than or equal to 1"),
    ],
)
def test_refusals(tiny: Any, sonoedge: Any, arguments: list[str], words: str) -> None:
    ran = sonoedge("evaluate", *(argument.format(bundle=tiny.bundle) for argument in arguments))
    assert ran.status == 2
    assert words in " ".join(ran.err.split())


def test_the_packaged_checkpoint_is_small_whole_and_as_good_as_promised() -> None:
    folder = train_demo.CHECKPOINT
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    config, headers = open_checkpoint(folder)
    assert config.moe is not None
    assert {header.dtype for header in headers.values()} == {"BF16"}
    numbers = msgspec.json.decode((folder / "evaluation.json").read_bytes())
    accuracy = numbers["accuracy"]
    assert accuracy["region"] >= 0.98
    assert accuracy["finding"] >= 0.92
    assert accuracy["kind"] >= 0.85
    assert accuracy["side"] >= 0.88
    assert numbers["training"]["parameters"] == sum(header.parameters for header in headers.values())
    assert f"{accuracy['region']:.1%}" in (folder / "README.md").read_text()


def test_the_packaged_checkpoint_answers(sonoedge: Any) -> None:
    ran = sonoedge("evaluate", train_demo.CHECKPOINT, "--frames", 60, "--json")
    assert ran.status == 0, ran.err
    accuracy = msgspec.json.decode(ran.last_line)["accuracy"]
    assert accuracy["region"] > 0.93
    assert accuracy["overall"] > 0.88


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    from sonoedge.errors import SonoEdgeError

    with pytest.raises(SonoEdgeError, match=r"config\.json"):
        open_model(tmp_path)
