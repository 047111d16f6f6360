"""Random checkpoints: whole, marked, the same bytes for the same seed, never half there."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export import make_checkpoint, random_weights
from sonoedge.export.checkpoint_files import image_spec, is_random, open_tokenizer
from sonoedge.export.inspect import inspect_checkpoint
from sonoedge.export.make_checkpoint import CONFIGS, make_random_checkpoint, named_config
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import config_tree, read_config
from sonoedge.export.models.loading import empty_model, load_checkpoint
from sonoedge.export.random_weights import RandomWeights
from sonoedge.export.safetensors_writer import TensorSpec

Run = Callable[..., Any]  # the `sonoedge` fixture


@pytest.fixture
def config(small_config: ModelConfig) -> ModelConfig:
    """The tiny EchoVLM with a vocabulary that holds every byte."""
    ids = {"vision_start_token_id": 290, "vision_end_token_id": 291, "image_token_id": 292, "video_token_id": 293}
    return msgspec.structs.replace(
        small_config, vocab_size=300, bos_token_id=280, pad_token_id=None, eos_token_ids=(282,), **ids
    )


@pytest.fixture
def config_file(config: ModelConfig, tmp_path: Path) -> Path:
    """Its config.json."""
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(config_tree(config)))
    return path


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer values to draw, for tests of anything but the values."""
    monkeypatch.setattr(random_weights, "POOL_VALUES", 65_537)


@pytest.mark.usefixtures("small_pool")
def test_the_verb_makes_a_whole_checkpoint(sonoedge: Run, config_file: Path, config: ModelConfig) -> None:
    out = config_file.parent / "deep" / "made"
    ran = sonoedge("make-checkpoint", "--config", config_file, "--random", "--out", out, "--json")
    assert (ran.status, "random weights" in ran.err) == (0, True)
    made = msgspec.json.decode(ran.last_line)
    found = inspect_checkpoint(out)
    assert (made["parameters"], made["bytes"], made["files"]) == (found.parameters, found.weight_bytes, found.files)
    assert (found.dtype, made["checkpoint"]) == ("BF16", str(out))
    assert is_random(out)
    assert read_config(out) == config
    assert open_tokenizer(out, config).im_start == 281
    assert image_spec(out).max_pixels == 196 * 28 * 28
    model = load_checkpoint(out)
    logits = model(torch.tensor([[1, 2, 3]]), torch.arange(3).expand(3, 1, 3)).logits
    assert logits.isfinite().all()
    assert [path.name for path in out.parent.iterdir()] == ["made"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_weights_have_the_scales_of_a_fresh_model(config: ModelConfig, tmp_path: Path) -> None:
    wide = msgspec.structs.replace(config, intermediate_size=4096)
    make_random_checkpoint(wide, tmp_path / "made", dtype="f32")
    state = load_checkpoint(tmp_path / "made").state_dict()
    assert abs(float(state["model.layers.0.mlp.down_proj.weight"].std()) * 64 - 1) < 0.01
    assert abs(float(state["model.layers.1.mlp.up_proj.weight"].std()) * 48**0.5 - 1) < 0.01
    assert abs(float(state["model.embed_tokens.weight"].std()) / 0.02 - 1) < 0.03
    assert float((state["visual.blocks.0.norm1.weight"] - 1).abs().max()) == 0
    assert 0 < float(state["model.layers.0.self_attn.q_proj.bias"].abs().max()) < 0.1


def test_no_two_rows_and_no_two_experts_are_equal(config: ModelConfig, tmp_path: Path) -> None:
    make_random_checkpoint(config, tmp_path / "made")
    state = load_checkpoint(tmp_path / "made").state_dict()
    for size in {tensor.shape[1:].numel() for tensor in state.values() if tensor.dim() > 1}:
        rows = torch.cat([t.flatten(1) for t in state.values() if t.dim() > 1 and t.shape[1:].numel() == size])
        assert len(rows.unique(dim=0)) == len(rows)


def test_rows_differ_beyond_the_end_of_the_pool() -> None:
    tensor = TensorSpec("model.embed_tokens.weight", "BF16", (9_000, 3584))  # 32 M values
    weights = RandomWeights(0)
    rows = torch.cat([torch.frombuffer(piece, dtype=torch.bfloat16) for piece in weights.pieces(tensor)])
    begins = rows.view(9_000, 3584)[:, :32].to(torch.float32)
    assert len(begins.unique(dim=0)) == 9_000


@pytest.mark.usefixtures("small_pool")
def test_the_seed_decides_every_byte(config: ModelConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_random_checkpoint(config, tmp_path / name, seed=seed)
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}


@pytest.mark.usefixtures("small_pool")
def test_transformers_reads_a_dense_one(config: ModelConfig, tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    make_random_checkpoint(msgspec.structs.replace(config, moe=None), tmp_path / "made")
    theirs: Any = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        wanted = theirs(input_ids=ids).logits
        found = load_checkpoint(tmp_path / "made")(ids, torch.arange(4).expand(3, 1, 4)).logits
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("name", "billions"), [("echovlm-500m", 0.527), ("echovlm-1b", 1.06), ("echovlm-2b", 2.07), ("echovlm-7b", 11.68)]
)
def test_packaged_sizes(name: str, billions: float) -> None:
    state = empty_model(named_config(name)).state_dict()
    assert abs(sum(tensor.numel() for tensor in state.values()) / 1e9 - billions) < 0.005
    # Blocks of 128 inputs divide every quantized row of the decoder.
    assert all(
        t.shape[1] % 128 == 0 for key, t in state.items() if key.startswith(("model.", "lm_head")) and t.dim() > 1
    )


def test_every_packaged_config_is_tested_above() -> None:
    assert len(list(CONFIGS.glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "echovlm-70b", "--random"), "choose one of echovlm-1b, echovlm-2b, echovlm-500m, echovlm-7b, or"),
        (("--config", "echovlm-1b"), "--random is missing"),
        (("--config", "echovlm-1b", "--random", "--dtype", "int8"), "Invalid value for '--dtype'"),
    ],
)
def test_refusals(sonoedge: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = sonoedge("make-checkpoint", *arguments, "--out", tmp_path / "made")
    assert ran.status == 2
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SonoEdgeError, match="model_type 'llama' is not supported"):
        named_config(str(tmp_path / "config.json"))


def test_a_place_that_is_taken_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SonoEdgeError, match="exists and is not an empty folder"):
        make_random_checkpoint(config, tmp_path)
    with pytest.raises(SonoEdgeError, match="cannot be written"):
        make_random_checkpoint(config, tmp_path / "file" / "made")


def test_a_disk_that_is_too_small_is_refused_at_once(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "BESIDE_WEIGHTS_BYTES", 10**18)
    with pytest.raises(SonoEdgeError, match=r"needs 1000000000\.0 GB and its disk has .* GB free: free space"):
        make_random_checkpoint(config, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "full"), SonoEdgeError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_nothing_is_left_of_a_half_written_one(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[Exception]
) -> None:
    whole = RandomWeights.pieces

    def fail_late(weights: RandomWeights, tensor: TensorSpec) -> Iterator[memoryview]:
        if tensor.name == "lm_head.weight":
            raise error
        yield from whole(weights, tensor)

    monkeypatch.setattr(RandomWeights, "pieces", fail_late)
    with pytest.raises(raised, match="the disk is full" if raised is SonoEdgeError else None):
        make_random_checkpoint(config, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
