"""Fixtures that tests of several folders share: the command line in process, recorded outputs, a small bundle."""

import os
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from sonoedge import cli
from sonoedge.bundle import (
    BundleWriter,
    Contents,
    DecoderSpec,
    Golden,
    Graph,
    Hashes,
    HintCalibration,
    ImageSpec,
    Model,
    StageCost,
)

# Tests take no model from the network, and two libraries each starting a thread pool slow a small machine down.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Ran(msgspec.Struct, frozen=True):
    """What one call of the command line did."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line on standard output: with --json, the result."""
        return self.out.rstrip("\n").rsplit("\n", 1)[-1]


class SonoEdge(Protocol):
    """The command line as tests call it."""

    def __call__(self, *arguments: object) -> Ran:
        """Run one verb in this process."""


@pytest.fixture
def sonoedge(capfd: pytest.CaptureFixture[str]) -> SonoEdge:
    """Call the command line in this process: `sonoedge("verify", path, "--json")`."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Recorded outputs of reference implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def contents() -> Contents:
    """What a build would know about the small bundle."""
    return Contents(
        model=Model(name="small", architecture="Qwen2VLMOEForConditionalGeneration", parameters=10, random=True),
        hashes=Hashes(recipe=None, calibration=None, prompt="0" * 64),
        toolchain={"onnx": "1.23.2"},
        profile="cpu-x86-64",
        intended_use="Tests only.",
        image=ImageSpec(),
        decoder=DecoderSpec(
            hidden=8,
            layers=1,
            heads=2,
            kv_heads=1,
            head_dim=4,
            vocab=16,
            context=64,
            image_token_id=3,
            eos_token_ids=(1,),
        ),
        graphs=(
            Graph(purpose="vision", formulation="ort", path="graphs/vision.onnx"),
            Graph(purpose="decoder", formulation="ort", path="graphs/decoder.onnx"),
        ),
        golden=Golden(path="golden", bound=1e-3),
        stages={"vision": StageCost(bytes=100, operations=200), "prefill": StageCost()},
        hint_calibration={"region": HintCalibration(temperature=1.5, abstain_below=0.6)},
    )


@pytest.fixture
def small_bundle(tmp_path: Path, contents: Contents) -> Path:
    """A bundle whose graphs are a few bytes that no session can load."""
    out = tmp_path / "bundle"
    with BundleWriter(out) as writer:
        writer.add("graphs/vision.onnx").write_bytes(b"vision")
        writer.add("graphs/decoder.onnx").write_bytes(b"decoder")
        writer.add("graphs/decoder.onnx.data").write_bytes(bytes(range(256)))
        writer.add("golden/inputs.npz").write_bytes(b"inputs")
        writer.add("tokenizer.json").write_text("{}")
        writer.commit(contents)
    return out
