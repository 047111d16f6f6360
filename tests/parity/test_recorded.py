"""`parity` on the recorded checkpoint: it passes, a wrong weight fails, and unusable recordings are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from sonoedge.errors import SonoEdgeError
from sonoedge.export.parity import TOLERANCE, run

CASES = {"text", "image", "two_images", "batch_left_padded"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def recorded(golden_folder: Path) -> Path:
    return golden_folder / "echovlm_tiny"


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def change(file: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    line: dict[str, object] = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    return line


def test_recorded_cases_are_reproduced(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recorded, recorded, as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    assert report["passed"] is True
    assert report["cases"].keys() == CASES
    errors = {name: case["max_abs_error"] for name, case in report["cases"].items()}
    print("largest errors:", errors)
    assert all(0 < error <= TOLERANCE for error in errors.values())
    assert all(case["tokens_equal"] for case in report["cases"].values())


def test_one_file_and_a_table(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recorded, recorded / "two_images.safetensors", as_json=False) == 0
    printed = capsys.readouterr().out
    assert "two_images" in printed
    assert "passed" in printed


@pytest.mark.parametrize(
    "key",
    [
        "visual.blocks.1.norm1.weight",
        "model.layers.1.moe.experts.2.down_proj.weight",
        "model.layers.2.moe.shared_expert_gate.weight",
        "model.layers.0.coefficient.bias",
        "lm_head.weight",
    ],
)
def test_a_wrong_weight_fails(copy: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "model.safetensors", lambda tensors: tensors[key].view(-1)[0].add_(1.0))
    assert run(copy, copy, as_json=True) == 1
    assert last_line(capsys)["passed"] is False


def test_numbers_that_are_none_fail(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert run(copy, copy / "text.safetensors", as_json=True) == 1
    assert last_line(capsys) == {"passed": False, "cases": {"text": {"max_abs_error": None, "tokens_equal": False}}}


def test_wrong_positions_fail(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "image.safetensors", lambda tensors: tensors["position_ids"][0, 0, 3].add_(1))
    assert run(copy, copy / "image.safetensors", as_json=False) == 1
    assert "differ" in capsys.readouterr().out


def test_a_wrong_token_fails(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "text.safetensors", lambda tensors: tensors["generated"][0, -1].add_(1))
    assert run(copy, copy / "text.safetensors", as_json=True) == 1


def test_a_recording_that_goes_on_after_an_end_token_is_followed(copy: Path) -> None:
    tree = msgspec.json.decode((copy / "config.json").read_bytes())
    tree["eos_token_id"] = int(load_file(copy / "text.safetensors")["generated"][0, 2])
    (copy / "config.json").write_bytes(msgspec.json.encode(tree))
    assert run(copy, copy / "text.safetensors", as_json=True) == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop("logits"), "has no logits"),
        (lambda tensors: tensors.pop("image_grid_thw"), "has no image_grid_thw"),
        (lambda tensors: tensors.update(logits=tensors["logits"][..., :9].clone()), "logits is"),
        (lambda tensors: tensors["input_ids"][0, 0].fill_(512), "input_ids must hold tokens from 0 to 511"),
        (lambda tensors: tensors.pop("router.1"), "records 2 of router.I"),
        (lambda tensors: tensors.update(image_grid_thw=torch.tensor([[1, 4, 4]])), "do not fill the grids"),
    ],
)
def test_unusable_recordings_are_refused(copy: Path, edit: Callable[[Tensors], object], words: str) -> None:
    change(copy / "image.safetensors", edit)
    with pytest.raises(SonoEdgeError) as refusal:
        run(copy, copy / "image.safetensors", as_json=True)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_folder_without_cases_is_refused(recorded: Path, tmp_path: Path) -> None:
    shutil.copyfile(recorded / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(SonoEdgeError, match="holds no recorded case"):
        run(recorded, tmp_path, as_json=True)


def test_path_that_does_not_exist_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="nowhere does not exist"):
        run(recorded, tmp_path / "nowhere", as_json=True)


def test_truncated_recording_is_refused(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_bytes((recorded / "text.safetensors").read_bytes()[:999])
    with pytest.raises(SonoEdgeError, match="not a whole safetensors file"):
        run(recorded, tmp_path, as_json=True)
