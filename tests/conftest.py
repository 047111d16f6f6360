"""Fixtures that tests of several folders share: the command line in process, recorded outputs, a small bundle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
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
    from collections.abc import Callable, Iterator, Mapping

    import onnx_ir as ir

    from sonoedge.calibration.pool import PhantomPool
    from sonoedge.export.models.config import ModelConfig
    from sonoedge.export.passes.products import Purpose
    from sonoedge.export.scheme import CacheScheme, QuantizationPlan
    from sonoedge.runtime.preprocess import Patches
    from sonoedge.runtime.sessions.base import Session

# Tests take no model from the network, and two libraries each starting a thread pool slow a small machine down.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the tests in the background lets them, and every program they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine's pauses are no defect of what is tested.
settings.register_profile("sonoedge", deadline=None)
settings.load_profile("sonoedge")


@pytest.fixture(scope="session", autouse=True)
def _own_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the keys that builds make out of the account of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        yield


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

    def __call__(self, path: Path, **changes: dict[str, Any] | None) -> Path:
        """Write one with sections changed, or left out (None)."""


class Tiny(msgspec.Struct, frozen=True):
    """What the verb `build` made of the smallest checkpoint, once for all tests."""

    checkpoint: Path
    recipe: Path
    bundle: Path
    report: dict[str, Any]  # its JSON line


class Marked:
    """The smallest checkpoint's graphs before any pass, each exported once: an export takes many seconds."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        self.config, self.context = config, context
        self._kept: dict[str, ir.Model] = {}

    def vision(self) -> ir.Model:
        """A copy of the vision tower's graph."""
        from sonoedge.export.graphs import export_vision

        return self._copy("vision", lambda: export_vision(self.config))

    def decoder(self, cache: CacheScheme | None = None) -> ir.Model:
        """A copy of the decoder's graph, its cache float (None) or as asked."""
        from sonoedge.export.graphs import export_decoder
        from sonoedge.export.scheme import CacheScheme

        scheme = cache or CacheScheme.FLOAT
        return self._copy(f"decoder {scheme.value}", lambda: export_decoder(self.config, self.context, scheme))

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Let builds of models of the same sizes take these graphs; others are refused."""
        from sonoedge.export import bundle_graphs

        def vision(config: ModelConfig) -> ir.Model:
            assert config == self.config
            return self.vision()

        def decoder(config: ModelConfig, _context: int, cache: CacheScheme) -> ir.Model:
            assert config == self.config  # the context is a number in shapes that nothing computes with
            return self.decoder(cache)

        patch.setattr(bundle_graphs, "export_vision", vision)
        patch.setattr(bundle_graphs, "export_decoder", decoder)

    def _copy(self, name: str, export: Callable[[], ir.Model]) -> ir.Model:
        if name not in self._kept:
            self._kept[name] = export()
        return self._kept[name].clone()


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
CONTEXT = TINY_RECIPE["limits"]["context"]


def _toml_key(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key)


@pytest.fixture(scope="session")
def write_recipe() -> WriteRecipe:
    """Write the packaged recipe at the smallest sizes: `write_recipe(path, limits={"context": 10})` changes more."""

    def write(path: Path, **changes: dict[str, Any] | None) -> Path:
        packaged = Path(__file__).parent.parent / "export" / "recipes" / "demo.toml"
        recipe = msgspec.toml.decode(packaged.read_bytes())
        for name, section in TINY_RECIPE.items():
            recipe[name] |= section
        for name, changed in changes.items():
            if changed is None:
                del recipe[name]
            else:
                recipe[name] = recipe.get(name, {}) | changed
        lines = [f"version = {recipe.pop('version')}"]
        for name, section in recipe.items():
            inner = {key: value for key, value in section.items() if isinstance(value, dict)}
            plain = {key: value for key, value in section.items() if key not in inner}
            for title, values in {name: plain, **{f"{name}.{key}": value for key, value in inner.items()}}.items():
                lines += [f"[{title}]", *(f"{_toml_key(key)} = {json.dumps(value)}" for key, value in values.items())]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_recipe(write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for the smallest checkpoint."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="session")
def marked(tiny_checkpoint: Path) -> Marked:
    """The smallest checkpoint's graphs before any pass."""
    from sonoedge.export.models.loading import open_checkpoint

    return Marked(open_checkpoint(tiny_checkpoint)[0], CONTEXT)


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path, tiny_recipe: Path, marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Build the smallest checkpoint with the verb itself."""
    from sonoedge.export import build

    bundle = tmp_path_factory.mktemp("built") / "bundle"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        marked.stand_in(patch)
        build.run(tiny_checkpoint, "cpu-x86-64", str(tiny_recipe), "phantoms", bundle, as_json=True)
    report = msgspec.json.decode(printed.getvalue().splitlines()[-1])
    return Tiny(tiny_checkpoint, tiny_recipe, bundle, report)


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


class GraphSession:
    """Graphs of a folder behind the runtime's session interface, without the runtime's own session."""

    form: ClassVar[str]  # as the graphs' files are named

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        from sonoedge.runtime.sessions.ort import load_graph

        self.spec, self.image, self.length = spec, ImageSpec(), 0
        self._vision = load_graph(path, 1) if (path := folder / f"vision.{self.form}.onnx").exists() else None
        self._decoder = load_graph(folder / f"decoder.{self.form}.onnx", 1)
        empty = self._empty_cache()
        self.cache = {f"{part}_{layer}": empty for layer in range(spec.layers) for part in ("key", "value")}

    def _empty_cache(self) -> npt.NDArray[Any]:
        """What a layer's past is before the first token."""
        raise NotImplementedError

    def _placed(self, visible: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
        """What the decoder is told of where tokens are and what they see [new, total]."""
        raise NotImplementedError

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture."""
        from sonoedge.runtime.sessions.ort import patch_places

        assert self._vision is not None
        feed = {"patches": patches.values, "places": patch_places(patches.grid, 2)}
        return np.asarray(self._vision.run(["image_embeds"], feed)[0])

    def extend(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        *,
        image_embeds: npt.NDArray[np.float32] | None = None,
        visible: npt.NDArray[np.bool_] | None = None,
        logits_rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the cache and return logits [r, vocab]; see `Session.extend`."""
        total = self.length + len(ids)
        if visible is None:
            visible = np.tri(len(ids), total, self.length, dtype=np.bool_)
        feed = {
            "input_ids": ids[None],
            "positions": positions[:, None],
            "image_embeds": np.zeros((1, self.spec.hidden), np.float32) if image_embeds is None else image_embeds,
            "logits_rows": np.array([len(ids) - 1]) if logits_rows is None else logits_rows,
            **self._placed(visible),
            **{f"past_{name}": value for name, value in self.cache.items()},
        }
        names = ["logits", *(f"present_{name}" for name in self.cache)]
        logits, *after = self._decoder.run(names, feed)
        self.cache = dict(zip(self.cache, after, strict=True))
        self.length = total
        return np.asarray(logits)

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        self.length = length

    def close(self) -> None:
        """Nothing is held beyond the arrays."""


class PortableSession(GraphSession):
    """The portable graphs: what the cache was comes out grown."""

    form = "portable"

    def _empty_cache(self) -> npt.NDArray[Any]:
        held = {value.name: value.type for value in self._decoder.get_inputs()}
        dtype = np.int8 if held["past_key_0"] == "tensor(int8)" else np.float32
        return np.zeros((1, self.spec.kv_heads, 0, self.spec.head_dim), dtype)

    def _placed(self, visible: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
        return {"attention_bias": np.where(visible, np.float32(0), np.float32(-1e9))[None, None]}

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        self.cache = {name: value[:, :, :length] for name, value in self.cache.items()}
        self.length = length


class BufferSession(GraphSession):
    """The graphs for TensorRT: what the cache's buffer was comes out with the new tokens in it."""

    form = "trt"
    SEES_NOTHING = -30000.0  # finite in 16 bit: a row that sees nothing gives numbers

    def _empty_cache(self) -> npt.NDArray[Any]:
        return np.zeros((1, self.spec.kv_heads, self.spec.context, self.spec.head_dim), np.float16)

    def _placed(self, visible: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
        new, total = visible.shape
        bias = np.full((1, 1, new, min(total + 3, self.spec.context)), self.SEES_NOTHING, np.float16)
        bias[0, 0, :, :total][visible] = 0
        return {"attention_bias": bias, "write_at": np.array([self.length])}


def _without_bfloat16(model: ir.Model) -> ir.Model:
    """The graph in float16 where it would compute in bfloat16, which ONNX Runtime has no products in on the CPU."""
    import onnx_ir as ir

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph:
            for name in ("to", "output_dtype"):
                if name in node.attributes and node.attributes[name].as_int() == ir.DataType.BFLOAT16:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
    return model


@pytest.fixture(scope="session")
def without_bfloat16() -> Callable[[ir.Model], ir.Model]:
    """Make a graph for TensorRT one that ONNX Runtime can run, in float16 where it is in bfloat16."""
    return _without_bfloat16


class Compiled:
    """Graphs in all forms over one weights file, in a folder, and sessions over them."""

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        self.folder, self.spec = folder, spec

    def path(self, name: str, purpose: Purpose) -> Path:
        """Where the graph `name` of this purpose is."""
        return self.folder / f"{name}.{purpose.value}.onnx"

    def open(self, purpose: Purpose, *, both: bool = False) -> Session:
        """Open the decoder of one purpose; `both`: ROWS, with TOKEN for one token at a time, as the runtime does."""
        from sonoedge.export.passes.products import Purpose
        from sonoedge.runtime.sessions.ort import OrtSession

        if purpose is Purpose.PORTABLE:
            return PortableSession(self.folder, self.spec)
        if purpose is Purpose.TENSORRT:
            return BufferSession(self.folder, self.spec)
        vision = self.path("vision", Purpose.ROWS)
        decoder = self.path("decoder", purpose)
        return OrtSession(
            vision if vision.exists() else decoder,  # never run where there is none
            decoder,
            ImageSpec(),
            self.spec,
            decode=self.path("decoder", Purpose.TOKEN) if both else None,
            threads=1,
        )


@pytest.fixture(scope="session")
def compile_graphs() -> Callable[..., Compiled]:
    """Write weights and lower marked graphs: `compile_graphs(checkpoint, graphs, plan, folder)`."""
    import onnx_ir as ir

    from sonoedge.calibration.smoothing import Smoothing
    from sonoedge.export.layout import plan_layout
    from sonoedge.export.lowering import lowered
    from sonoedge.export.models.loading import open_checkpoint
    from sonoedge.export.passes.products import Purpose
    from sonoedge.export.torch_session import decoder_spec
    from sonoedge.export.weight_file import write_weights

    def make(
        checkpoint: Path, graphs: Mapping[str, ir.Model], plan: QuantizationPlan, folder: Path, context: int = CONTEXT
    ) -> Compiled:
        config, headers = open_checkpoint(checkpoint)
        folder.mkdir()
        weights, layout = folder / "model.weights", plan_layout(config, plan)
        write_weights(weights, layout, headers, Smoothing.none(), identity="of a test")
        compiled = Compiled(folder, decoder_spec(config, context))
        for name, graph in graphs.items():
            for purpose in Purpose:
                if (name, purpose) != ("vision", Purpose.TOKEN):
                    model = _without_bfloat16(lowered(graph, config, plan, layout, weights, purpose))
                    ir.save(model, compiled.path(name, purpose))
        return compiled

    return make
