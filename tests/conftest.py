"""Fixtures that tests of several folders share: the command line in process, recorded outputs, a small bundle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import numpy as np
import pytest
from hypothesis import settings

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

if TYPE_CHECKING:
    from sonoedge.calibration.pool import PhantomPool

# Tests take no model from the network, and two libraries each starting a thread pool slow a small machine down.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the tests in the background lets them, and every program they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine's pauses are no defect of what is tested.
settings.register_profile("sonoedge", deadline=None)
settings.load_profile("sonoedge")


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


class WriteRecipe(Protocol):
    """Writes recipes for the smallest checkpoint."""

    def __call__(self, path: Path, **changes: dict[str, Any]) -> Path:
        """Write one with sections changed."""


class Tiny(msgspec.Struct, frozen=True):
    """What the verb `build` made of the smallest checkpoint: once for all tests, because every export takes seconds."""

    checkpoint: Path
    recipe: Path
    bundle: Path
    report: dict[str, Any]  # its JSON line
    marked: dict[str, Any]  # onnx_ir models before quantization: "vision", "in_place", "standard"


@pytest.fixture(scope="session")
def tiny_checkpoint(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded random EchoVLM as a whole checkpoint: with a tokenizer for its special ids, and small pictures."""
    from sonoedge.calibration.phantom import KINDS, REGIONS, Lesion, Truth
    from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    folder.mkdir()
    recorded = golden_folder / "echovlm_tiny"
    shutil.copyfile(recorded / "model.safetensors", folder / "model.safetensors")
    sides: tuple[Literal["left", "right"], ...] = ("left", "right", "left", "right")
    truths = [
        Truth(region, quality, "linear", 0.2, Lesion(kind, side, 20.0, 9.0, 15.0, (60.0, y)), 0, 224)
        for region in REGIONS
        for kind, side, quality, y in zip(KINDS, sides, ("good", "poor") * 2, (50.0, 170.0) * 2, strict=True)
    ]
    truths += [Truth(region, "good", "linear", 0.2, None, 0, 224) for region in REGIONS]
    write_tokenizer(train_tokenizer(truths, 512, seed=1), folder)
    # Special tokens move from the front to the end, where this checkpoint has them.
    ids = {"<|vision_start|>": 508, "<|vision_end|>": 509, "<|video_pad|>": 510, "<|image_pad|>": 511}
    ids |= {token: 504 + n for n, token in enumerate(t for t in SPECIAL_TOKENS if t not in ids)}
    tree = msgspec.json.decode((folder / "tokenizer.json").read_bytes())
    plain = sorted((old, token) for token, old in tree["model"]["vocab"].items() if token not in ids)
    tree["model"]["vocab"] = {token: new for new, (_, token) in enumerate(plain)}
    tree["added_tokens"] = sorted(
        ({**token, "id": ids[token["content"]]} for token in tree["added_tokens"]), key=lambda token: token["id"]
    )
    (folder / "tokenizer.json").write_bytes(msgspec.json.encode(tree))
    config = msgspec.json.decode((recorded / "config.json").read_bytes())
    config["eos_token_id"] = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    (folder / "preprocessor_config.json").write_bytes(msgspec.json.encode({"max_pixels": 84 * 84}))
    return folder


# What differs from the packaged recipe.
TINY_RECIPE: dict[str, dict[str, Any]] = {
    "student": {
        "vision_layers": 1,
        "vision_mlp_size": 96,
        "layers": 2,
        "intermediate_size": 96,
        "expert_size": 24,
        "shared_expert_size": 48,
    },
    "distill": {
        "first_frame_seed": 100,
        "frames": 24,
        "vision_steps": 8,
        "steps": 24,
        "batch": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
    },
    "calibration": {"first_frame_seed": 200, "frames": 12, "least_expert_tokens": 8},
    "hints": {"first_frame_seed": 300, "frames": 240, "least_accuracy": 0.9, "known_share": 0.95},
    "limits": {"context": 640, "golden_cases": 2},
}


@pytest.fixture(scope="session")
def write_recipe() -> WriteRecipe:
    """Write the packaged recipe at the smallest sizes: `write_recipe(path, limits={"context": 10})` changes more."""

    def write(path: Path, **changes: dict[str, Any]) -> Path:
        packaged = Path(__file__).parent.parent / "export" / "recipes" / "demo.toml"
        recipe = msgspec.toml.decode(packaged.read_bytes())
        for name, section in TINY_RECIPE.items():
            recipe[name] |= section
        for name, section in changes.items():
            recipe[name] = recipe.get(name, {}) | section
        lines = [f"version = {recipe.pop('version')}"]
        for name, section in recipe.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_recipe(write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for the smallest checkpoint."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Build the smallest checkpoint with the verb itself, and keep the graphs as they were before quantization."""
    from sonoedge.export import build, bundle_graphs
    from sonoedge.export.graphs import export_decoder, export_vision

    bundle = tmp_path_factory.mktemp("built") / "bundle"
    marked = {}

    def keep(name: str, model: Any) -> Any:
        marked[name] = model.clone()
        return model

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bundle_graphs, "export_vision", lambda model: keep("vision", export_vision(model)))
        patch.setattr(
            bundle_graphs,
            "export_decoder",
            lambda model, kind, context: keep(kind.name.lower(), export_decoder(model, kind, context)),
        )
        build.run(tiny_checkpoint, "cpu-x86-64", str(tiny_recipe), "phantoms", bundle, as_json=True)
    report = msgspec.json.decode(printed.getvalue().splitlines()[-1])
    return Tiny(tiny_checkpoint, tiny_recipe, bundle, report, marked)


@pytest.fixture(scope="session")
def frames(tiny_checkpoint: Path) -> PhantomPool:
    """Two dozen phantoms at the smallest checkpoint's resolution."""
    from sonoedge.calibration.pool import PhantomPool, render
    from sonoedge.export.checkpoint_files import image_spec

    spec = image_spec(tiny_checkpoint)
    made = [render(seed, spec) for seed in range(100, 124)]
    return PhantomPool(
        100,
        np.stack([frame.grey for frame in made]),
        np.stack([frame.lesion_classes for frame in made]),
        [frame.truth for frame in made],
    )
