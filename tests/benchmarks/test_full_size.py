"""The bench of a full-size build, at the smallest size: one command whose last line says everything."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent.parent


def test_the_whole_bench_but_the_build(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything runs as it does at full size, except that the bundle is one that is there already."""
    from benchmarks import full_size
    from benchmarks.memory import Measured, run_measured

    def run(command: Sequence[str]) -> Measured:
        if "build" not in command:
            return run_measured(command)
        assert command[command.index("--recipe") + 1] == "weight-only"
        assert (Path(command[command.index("build") + 1]) / "config.json").is_file()
        shutil.copytree(tiny.bundle, command[command.index("--out") + 1])
        return Measured(seconds=10.0, peak_anonymous_bytes=2**30, last_line="{}")

    monkeypatch.setattr(full_size, "run_measured", run)
    monkeypatch.chdir(ROOT)
    work = tmp_path / "work"
    full_size.main(config=str(tiny.checkpoint / "config.json"), work=work)
    found = msgspec.json.decode(capfd.readouterr().out.splitlines()[-1], type=full_size.FullSize)
    assert (found.random, found.recipe, found.checkpoint_bytes) == (True, "weight-only", 2 * found.parameters)
    assert found.make_s is not None
    assert found.make_peak_anonymous_bytes is not None
    assert found.make_peak_anonymous_bytes < 2**30
    assert (found.build_s, found.build_peak_anonymous_bytes) == (10.0, 2**30)
    assert found.build_ratio > 1
    assert found.bundle_bytes > found.parameters
    assert 0 < found.answer.tokens <= 32
    assert found.answer.prompt_tokens > 9
    assert list(work.iterdir()) == []


def test_a_step_that_fails_ends_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import full_size

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="'echovlm-9b' is neither packaged nor a file"):
        full_size.main(config="echovlm-9b", work=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_converts_every_tensor(tmp_path: Path) -> None:
    from benchmarks.numpy_baseline import convert_seconds

    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 3, 4), "b": torch.randn(6), "c": torch.zeros(2, 7)}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    assert convert_seconds(tmp_path, tmp_path / "int8") > 0
    wide = half["a"].float().flatten(1)
    scale = wide.abs().amax(1) / 127
    codes = torch.fake_quantize_per_channel_affine(wide, scale, torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    content = (tmp_path / "int8").read_bytes()
    assert len(content) == 5 * 12 + 5 * 4 + 6 * 4 + 2 * 7 + 2 * 4
    found = np.frombuffer(content[:60], np.int8).reshape(5, 12) * np.frombuffer(content[60:80], np.float32)[:, None]
    np.testing.assert_allclose(found, codes.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(np.frombuffer(content[80:104], np.float32), half["b"].float().numpy())
    assert not any(content[104:118])


def test_the_baseline_refuses_another_type(tmp_path: Path) -> None:
    from benchmarks.numpy_baseline import convert_seconds

    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds F32"):
        convert_seconds(tmp_path, tmp_path / "int8")
