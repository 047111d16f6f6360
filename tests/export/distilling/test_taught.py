"""The recorded teacher: what was written is what it says, reused, resumed, and refused where it is not this run's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sonoedge.export.corpus import Batches, ConversationCorpus
from sonoedge.export.distilling.draws import Draws
from sonoedge.export.distilling.losses import TopK
from sonoedge.export.distilling.processes import join
from sonoedge.export.distilling.taught import LiveTeacher, Wanted
from sonoedge.export.distilling.taught_files import SHARD, TaughtFiles, TaughtManifest
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)
WANTED = Wanted(temperature=2.0, top_k=8, logits=True, hidden_layers=(0, 2), router_layers=(0, 2))
MANIFEST = TaughtManifest("t", "d", 1, "apart", SHARD + 5, 400, "f32", WANTED)


@pytest.fixture
def draws(cases: Path, tiny_tokenizer: Tokenizer) -> Draws:
    corpus = ConversationCorpus(cases, SPEC)
    collator = Batches(corpus, tiny_tokenizer, SPEC, size=4, seed=0, context=400)
    return Draws(corpus, collator, seed=1, distinct=MANIFEST.draws)


def test_what_is_read_is_what_the_teacher_says(tiny_model: EchoVLM, draws: Draws, tmp_path: Path) -> None:
    accelerator = join()
    live = LiveTeacher(tiny_model, WANTED, accelerator.device)
    files = TaughtFiles(tmp_path / "taught", MANIFEST, accelerator)
    assert not files.complete()
    files.record(draws, live, most=3)
    assert files.complete()
    assert len(list((tmp_path / "taught").iterdir())) == 3  # two shards and the manifest
    for first in (0, SHARD - 2, SHARD + 4):  # within a shard, over its end, and back to the beginning
        for item in draws.passes(range(first, first + 4), 4):
            said, read = live.taught(item, vision_only=False), files.taught(item, vision_only=False)
            assert isinstance(said.logits, TopK)
            assert isinstance(read.logits, TopK)
            assert torch.equal(said.logits.indices, read.logits.indices)
            assert (said.logits.log_probabilities - read.logits.log_probabilities).abs().max() < 5e-3
            assert (said.logits.log_tail - read.logits.log_tail).abs().max() < 5e-3
            total = read.logits.log_probabilities.exp().sum(1) + read.logits.log_tail.exp()
            assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
            pairs = [(said.embeds, read.embeds), *zip(said.hidden, read.hidden, strict=True)]
            for mine, theirs in [*pairs, *zip(said.router, read.router, strict=True)]:
                assert mine.shape == theirs.shape
                assert (mine - theirs).abs().max() <= 1e-3 * mine.abs().max()
            seen = files.taught(item, vision_only=True)
            assert torch.equal(seen.embeds, read.embeds)
            assert seen.logits is None


def test_only_missing_shards_are_recorded(tiny_model: EchoVLM, draws: Draws, tmp_path: Path) -> None:
    accelerator = join()
    live = LiveTeacher(tiny_model, WANTED, accelerator.device)
    files = TaughtFiles(tmp_path, MANIFEST, accelerator)
    files.record(draws, live, most=4)
    shards = sorted(tmp_path.glob("*.safetensors"))
    kept = shards[0].stat().st_mtime_ns
    before = shards[1].read_bytes()
    shards[1].unlink()
    (tmp_path / "taught-000001.77.partial").write_bytes(b"half")
    again = TaughtFiles(tmp_path, MANIFEST, accelerator)
    again.record(draws, live, most=4)
    assert shards[0].stat().st_mtime_ns == kept
    assert shards[1].read_bytes() == before


def test_a_student_learns_the_same_from_the_recorded_teacher(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], sonoedge: Any, runs: Any, tmp_path: Path
) -> None:
    recipe, taught = small_recipe(top_k=16), tmp_path / "taught"

    def distil(name: str, *more: object) -> Any:
        arguments = ("distill", tiny_checkpoint, "--recipe", recipe, "--data", cases, "--out", tmp_path / name)
        return sonoedge(*arguments, *more)

    assert distil("live").status == 0
    assert "record the teacher" in (first := distil("first", "--taught", taught)).err
    assert first.status == 0
    assert "record the teacher" not in (second := distil("second", "--taught", taught)).err
    assert second.status == 0
    logs = {name: runs.steps(tmp_path / name) for name in ("live", "first", "second")}
    assert logs["first"] == logs["second"]
    found = runs.farthest(logs["live"], logs["first"])
    print(f"largest difference of a loss between the live teacher and the recorded: {found:.2g}")
    assert 0 < found < 5e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 3.0}, "holds outputs for wanted = "),
        ({"seed": 8}, "holds outputs for seed = 7 and this run has 8: remove it, or choose another --taught"),
        ({"steps": 9}, "holds outputs for draws = 24 and this run has 36"),
        ({"turns": "in order"}, "holds outputs for turns = "),
        ({"top_k": 0}, "distill.top_k = 0 keeps whole distributions, which are not recorded"),
    ],
)
def test_outputs_for_another_run_are_refused(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], sonoedge: Any, tmp_path: Path,
    changes: dict[str, Any], words: str,
) -> None:  # fmt: skip
    def distil(recipe: Path, name: str) -> Any:
        arguments = ("distill", tiny_checkpoint, "--recipe", recipe, "--data", cases, "--out", tmp_path / name)
        return sonoedge(*arguments, "--taught", tmp_path / "taught")

    assert distil(small_recipe(top_k=8), "first").status == 0
    ran = distil(small_recipe("other.toml", **{"top_k": 8} | changes), "second")
    assert ran.status == 2
    assert words in ran.err


def test_another_teacher_or_other_data_are_refused(cases: Path, tmp_path: Path) -> None:
    accelerator = join()
    TaughtFiles(tmp_path, MANIFEST, accelerator)
    for changed in (
        msgspec.structs.replace(MANIFEST, teacher="u"),
        msgspec.structs.replace(MANIFEST, data="e"),
    ):
        with pytest.raises(Exception, match=r"holds outputs for (teacher|data) = "):
            TaughtFiles(tmp_path, changed, accelerator)


def test_two_processes_share_the_recording(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], runs: Any, tmp_path: Path
) -> None:
    recipe = small_recipe(top_k=8, steps=4, distinct_draws=3 * SHARD)
    arguments = (tiny_checkpoint, "--recipe", recipe, "--data", cases, "--taught", tmp_path / "taught", "--out")
    began = time.monotonic()
    two = runs.start(*arguments, tmp_path / "two", processes=2)
    _, told = two.communicate(timeout=200)
    assert two.returncode == 0, told
    print(f"{time.monotonic() - began:.1f} s")
    names = sorted(path.name for path in (tmp_path / "taught").iterdir())
    assert names == ["manifest.json", *(f"taught-{shard:06d}.safetensors" for shard in range(3))]
