"""Parts of training: the balance loss, the dense heads and their targets, the demo's tokenizer."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from sonoedge.calibration.pool import LESION_CLASSES, PhantomPool
from sonoedge.export.balance import balance_loss
from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer
from sonoedge.export.dense_heads import DenseHeads, VisionTap, _targets
from sonoedge.export.memory import PeakMemory
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

SPEC = ImageSpec(max_pixels=84 * 84)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (8, 3)])
def test_balance_is_one_when_even_and_experts_over_k_when_crowded(experts: int, top_k: int) -> None:
    even = torch.stack([torch.roll(torch.linspace(1, 0, experts) * 20, n) for n in range(experts)])
    assert balance_loss([even], top_k) == pytest.approx(1.0, abs=1e-4)
    crowded = torch.full((7, experts), -50.0)
    crowded[:, :top_k] = 0.0
    assert balance_loss([crowded[None]], top_k) == pytest.approx(experts / top_k)
    assert balance_loss([even, crowded], top_k) == pytest.approx((1 + experts / top_k) / 2, abs=1e-4)


def test_balance_pushes_the_crowd_apart() -> None:
    logits = torch.zeros(6, 4)
    logits[:, 1] = 1.0
    logits.requires_grad_()
    balance_loss([logits], 1).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] > 0).all()
    assert (logits.grad[:, [0, 2, 3]] < 0).all()


def test_targets_lie_in_the_order_of_the_patches(frames: PhantomPool) -> None:
    """Each patch's target is the class of the place that the patch's own pixels come from."""
    frame = frames[0]
    places = np.arange(36, dtype=np.uint8).reshape(6, 6)
    marked = msgspec.structs.replace(frame, grey=np.kron(places, np.ones((14, 14), np.uint8)), lesion_classes=places)
    per_patch, per_merged = _targets([marked])
    values = marked.patches(SPEC).values.reshape(36, 3, -1)[:, 0, 0]
    pixels = np.rint((values * SPEC.std[0] + SPEC.mean[0]) * 255).astype(int)
    assert per_patch.tolist() == pixels.tolist()
    assert per_merged.tolist() == pixels.reshape(-1, 4).max(axis=1).tolist()


def test_heads_teach_the_vision_tower(frames: PhantomPool, tiny_model: EchoVLM, one_thread: None) -> None:
    torch.manual_seed(0)
    heads, tap = DenseHeads(32, 64), VisionTap(tiny_model)
    few = [frames[index] for index in range(4)]
    patches = [frame.patches(SPEC) for frame in few]
    features, embeds = tap.encode(
        torch.from_numpy(np.concatenate([p.values for p in patches])), [p.grid for p in patches]
    )
    assert features.shape == (4 * 36, 32)
    assert embeds.shape == (4 * 9, 64)
    loss = heads(features, embeds, few)
    loss.backward()
    gradient = tiny_model.visual.patch_embed.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert tiny_model.model.embed_tokens.weight.grad is None
    assert heads.patch.out_features == LESION_CLASSES
    tiny_model.zero_grad(set_to_none=True)


def test_tokenizer_is_reproducible_and_loses_nothing(frames: PhantomPool, tmp_path: Path) -> None:
    first, second = (train_tokenizer(frames.truths, 400, seed=3) for _ in range(2))
    assert first.to_str() == second.to_str()
    write_tokenizer(first, tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert len(tokenizer) == 400
    for text in ("Which region is shown?", "是否可见病灶？ 7 mm", "naïve 𝛼 \n\t <|im_end|>", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [first.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer.encode("Which region is shown?")) <= 6  # a question of every frame
    settings = msgspec.json.decode((tmp_path / "tokenizer_config.json").read_bytes())
    assert settings["eos_token"] == "<|im_end|>"


def test_peak_memory_sees_a_large_array() -> None:
    with PeakMemory() as memory:
        held = np.ones(40_000_000, np.float64)
        while memory.bytes < held.nbytes:
            memory._stop.wait(0.05)
    assert memory.bytes > held.nbytes
