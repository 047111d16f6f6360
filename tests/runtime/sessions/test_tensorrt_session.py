"""The TensorRT session on a GPU and a TensorRT made of NumPy, beside a model that reads every token anew each time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoedge.bundle import DecoderSpec, ImageSpec
from sonoedge.engine_manifest import Bucket, Engine, EngineSet, Golden
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import Patches
from sonoedge.runtime.sessions.tensorrt import TensorRtSession, check_memory

IMAGE_TOKEN = 3
SPEC = DecoderSpec(
    hidden=8,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=4,
    vocab=11,
    context=24,
    image_token_id=IMAGE_TOKEN,
    eos_token_ids=(1,),
)
PREFILL = tuple(Bucket(rows=r, seen=s, images=r, logits=n) for r, s, n in ((4, 12, 2), (4, 24, 2), (8, 24, 3)))
DECODE = tuple(Bucket(rows=1, seen=s, images=1, logits=1) for s in (12, 24))
GROWN_PREFILL = tuple(Bucket(rows=r, seen=24 + r, images=r, logits=2) for r in (4, 8))
GROWN_DECODE = (Bucket(rows=1, seen=25, images=1, logits=1),)
CAPACITY = SPEC.context + 8
VISION = (Bucket(rows=8), Bucket(rows=16))

_rng = np.random.default_rng(0)
_H = SPEC.hidden
_TABLE = _rng.normal(size=(SPEC.vocab, _H))
_TURN = _rng.normal(size=(3, _H)) * 0.3
_IN = [{part: _rng.normal(size=(_H, _H)) * 0.5 for part in "qkvo"} for _ in range(SPEC.layers)]


def embedded(ids: Any, positions: Any, image_embeds: Any) -> npt.NDArray[np.float64]:
    """Rows [n, hidden] of tokens, the pictures' rows in order at their tokens."""
    x = _TABLE[ids]
    is_image = ids == IMAGE_TOKEN
    x[is_image] = image_embeds[np.cumsum(is_image)[is_image] - 1]
    return np.asarray(x + np.sin(positions.T @ _TURN))


def split(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(x.reshape(len(x), SPEC.kv_heads, SPEC.head_dim).transpose(1, 0, 2))


def attend(q: Any, k: Any, v: Any, bias: Any) -> npt.NDArray[np.float64]:
    """[heads, n, d] over [heads, t, d] with a bias [n, t]."""
    scores = q @ k.astype(np.float64).transpose(0, 2, 1) / 2 + bias.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64)
    assert np.isfinite(mixed).all(), "padding or masked cache is no number"
    return np.asarray(mixed.transpose(1, 0, 2).reshape(q.shape[1], _H))


def decoder(inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """What an engine of this little model computes, its cache in place where it has `write_at`, else grown."""
    bias = inputs["attention_bias"][0, 0]
    x = embedded(inputs["input_ids"][0], inputs["positions"][:, 0], inputs["image_embeds"])
    outputs: dict[str, npt.NDArray[Any]] = {}
    for layer, weights in enumerate(_IN):
        seen = {}
        for part in ("key", "value"):
            past, new = inputs[f"past_{part}_{layer}"], split(x @ weights[part[0]])
            if "write_at" in inputs:
                at = int(inputs["write_at"][0])
                assert at + len(x) <= past.shape[2], "padding is written past the end of the cache"
                present = past.copy()
                present[0, :, at : at + len(x)] = new
            else:
                present = np.concatenate([past, new[None].astype(past.dtype)], axis=2)
            outputs[f"present_{part}_{layer}"] = present
            seen[part] = present[0, :, : bias.shape[1]]
        x = x + np.tanh(attend(split(x @ weights["q"]), seen["key"], seen["value"], bias) @ weights["o"])
    outputs["logits"] = (x[inputs["logits_rows"]] @ _TABLE.T).astype(np.float32)
    return outputs


class Anew:
    """Every call computes all tokens from the start, each row under its own mask."""

    def __init__(self, cache: type[np.floating]) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.positions: list[npt.NDArray[Any]] = []
        self.rows: list[npt.NDArray[Any]] = []  # of the pictures
        self.sees: list[npt.NDArray[np.bool_]] = []

    def rewind(self, length: int) -> None:
        pictures = sum(token == IMAGE_TOKEN for token in self.ids[:length])
        for kept, size in ((self.ids, length), (self.positions, length), (self.sees, length), (self.rows, pictures)):
            del kept[size:]

    def extend(self, ids: Any, positions: Any, image_embeds: Any, visible: Any, logits_rows: Any) -> Any:
        before = len(self.ids)
        self.ids += ids.tolist()
        self.positions += list(positions.T)
        self.rows += list(image_embeds) if image_embeds is not None else []
        self.sees += list(np.tri(len(ids), before + len(ids), before, dtype=np.bool_) if visible is None else visible)
        total = len(self.ids)
        mask = np.full((total, total), -np.inf)
        for row, sees in enumerate(self.sees):
            mask[row, np.flatnonzero(sees)] = 0
        pictures = np.array(self.rows).reshape(-1, _H)
        x = embedded(np.array(self.ids), np.array(self.positions).T, pictures)
        for weights in _IN:
            k, v = (split(x @ weights[part]).astype(self.cache) for part in "kv")
            x = x + np.tanh(attend(split(x @ weights["q"]), k, v, mask) @ weights["o"])
        return x[before + logits_rows] @ _TABLE.T


def vision(inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    merged = inputs["patches"].reshape(-1, 4, 1176).mean(axis=1)
    return {"image_embeds": merged[:, :_H] + inputs["places"][::4, :1]}


class Rig:
    """A session on fakes, and what they saw."""

    def __init__(
        self, fake: Any, folder: Path, *, in_place: bool = True, builder: str = "tensorrt", **changes: Any
    ) -> None:
        self.cuda = fake.Cuda()
        capacity = changes.pop("capacity", CAPACITY)
        prefill, decode = (PREFILL, DECODE) if in_place else (GROWN_PREFILL, GROWN_DECODE)
        prefill = changes.pop("prefill", prefill)
        make = fake.decoder_plan
        self.plans = {
            "vision": fake.vision_plan(vision, _H, VISION),
            "decoder": make(decoder, SPEC, prefill, in_place=in_place, capacity=capacity),
            "decode": make(decoder, SPEC, decode, in_place=in_place, capacity=capacity),
        }
        self.trt = fake.TensorRt(self.cuda, self.plans)
        self.trt.capturable = changes.pop("capturable", True)
        engines = []
        for stage, buckets in (("vision", VISION), ("decoder", prefill), ("decode", decode)):
            (folder / f"{stage}.plan").write_bytes(stage.encode())
            engines.append(
                Engine(
                    stage=stage,  # type: ignore[arg-type]
                    path=f"{stage}.plan",
                    sha256=hashlib.sha256(stage.encode()).hexdigest(),
                    bytes=len(stage),
                    buckets=changes.pop(stage, buckets),
                    cache_in_place=in_place,
                    workspace_bytes=512,
                )
            )
        self.engines = EngineSet(
            profile="jetson-orin-nano-8gb",
            sm=87,
            builder=builder,  # type: ignore[arg-type]
            builder_version="10.16.2",
            driver=None,
            model="m",
            experts="none",
            kernels=None,
            engines=tuple(engines),
            golden=Golden("not run"),
        )
        assert not changes
        self.session = TensorRtSession(folder, self.engines, ImageSpec(), SPEC, self.trt, self.cuda)


@pytest.fixture
def rig(fake: Any, tmp_path: Path) -> Callable[..., Rig]:
    """Make a session: `rig(in_place=False, capacity=30)`."""

    def make(**changes: Any) -> Rig:
        return Rig(fake, tmp_path, **changes)

    return make


def call(
    draw: st.DrawFn, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Any, Any, npt.NDArray[np.int64]]:
    """Arguments of one `extend` behind `length` tokens."""
    new = draw(st.integers(1, SPEC.context - length))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ids = rng.integers(0, SPEC.vocab, new)
    if not draw(st.booleans()):
        ids[ids == IMAGE_TOKEN] = 0
    embeds = rng.normal(size=((ids == IMAGE_TOKEN).sum(), _H)).astype(np.float32)
    positions = rng.integers(0, 40, (3, new))
    visible = None
    if draw(st.booleans()):
        visible = rng.random((new, length + new)) < 0.5
        visible &= np.tri(new, length + new, length, dtype=np.bool_)
        visible[np.arange(new), length + np.arange(new)] = True
    rows = rng.integers(0, new, draw(st.integers(1, 9)))
    return ids, positions, embeds if len(embeds) else None, visible, rows


@pytest.mark.parametrize(
    ("in_place", "spare", "cache", "bound"),
    [(True, 8, np.float16, 2e-3), (True, 0, np.float16, 2e-3), (False, 0, np.float32, 1e-5)],
)
@settings(max_examples=60)
@given(data=st.data())
def test_chunks_give_what_one_pass_gives(
    fake: Any,
    tmp_path_factory: pytest.TempPathFactory,
    in_place: bool,
    spare: int,
    cache: Any,
    bound: float,
    data: st.DataObject,
) -> None:
    """Also where the cache has no room behind the context for padding: there the last tokens come one at a time."""
    rig = Rig(fake, tmp_path_factory.mktemp("engines"), in_place=in_place, capacity=SPEC.context + spare)
    session, anew = rig.session, Anew(cache)
    for _ in range(data.draw(st.integers(1, 5))):
        if session.length and data.draw(st.booleans()):
            length = data.draw(st.integers(0, session.length))
            session.rewind(length)
            anew.rewind(length)
        if session.length == SPEC.context:
            break
        ids, positions, embeds, visible, rows = data.draw(st.composite(call)(session.length))
        found = session.extend(ids, positions, image_embeds=embeds, visible=visible, logits_rows=rows)
        wanted = anew.extend(ids, positions, embeds, visible, rows)
        assert found.dtype == np.float32
        assert np.abs(found - wanted).max() < bound
        assert session.length == len(anew.ids)
    session.close()
    assert rig.cuda.allocations == rig.cuda.graphs == 0


def tokens(count: int, first: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.arange(count) % 3, np.tile(np.arange(first, first + count), (3, 1))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("builder", "capturable"), [("tensorrt", False), ("tensorrt_rtx", True), ("tensorrt_rtx", False)]
)
def test_decode_is_captured_once_and_then_launched(
    rig: Callable[..., Rig], in_place: bool, builder: str, capturable: bool
) -> None:
    """TensorRT has no word on what can be captured; of TensorRT for RTX, what cannot is run without."""
    made = rig(in_place=in_place, builder=builder, capturable=capturable)
    session, anew = made.session, Anew(np.float16 if in_place else np.float32)
    for step in range(20):
        ids, positions = tokens(1, step)
        found = session.extend(ids, positions)
        assert np.abs(found - anew.extend(ids, positions, None, None, np.array([0]))).max() < 2e-3
    buckets = 2 if in_place else 1  # a grown cache is read as a whole
    graphs = 0 if builder == "tensorrt_rtx" and not capturable else buckets
    assert made.cuda.graphs == graphs
    assert made.cuda.launches == (20 - buckets if graphs else 0)
    assert made.plans["decode"].runs == 20
    assert made.plans["decoder"].runs == 0


def test_a_captured_step_takes_up_pictures_too(rig: Callable[..., Rig]) -> None:
    """A graph was captured with a word: later an image token comes, then a word again."""
    session, anew = rig().session, Anew(np.float16)
    for step, token in enumerate((0, 1, IMAGE_TOKEN, 2, IMAGE_TOKEN)):
        ids, positions = np.array([token]), np.full((3, 1), step)
        embeds = np.full((1, _H), step, np.float32) if token == IMAGE_TOKEN else None
        found = session.extend(ids, positions, image_embeds=embeds)
        assert np.abs(found - anew.extend(ids, positions, embeds, None, np.array([0]))).max() < 2e-3


def test_the_smallest_engine_that_holds_them_runs(rig: Callable[..., Rig]) -> None:
    made = rig()
    widths: list[tuple[int, ...]] = []

    def noted(inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Any:
            widths.append(inputs["attention_bias"].shape[2:])
            return inner(inputs)

        return run

    for plan in (made.plans["decoder"], made.plans["decode"]):
        plan.run = noted(plan.run)
    for count, wanted in ((3, [(4, 12)]), (1, [(1, 12)]), (8, [(8, 24)]), (9, [(8, 24), (1, 24)])):
        widths.clear()
        made.session.extend(*tokens(count))
        assert widths == wanted
    made.session.rewind(0)
    widths.clear()
    made.session.extend(*tokens(4), logits_rows=np.arange(4))  # two rows of logits a run, three in the larger engine
    assert widths == [(4, 12), (4, 12)]


def test_pictures_take_the_engine_that_holds_them(rig: Callable[..., Rig]) -> None:
    made = rig()
    for rows, columns in ((2, 2), (2, 4), (2, 6), (4, 4), (2, 4)):
        values = np.random.default_rng(rows * columns).normal(size=(rows * columns, 1176)).astype(np.float32)
        embeds = made.session.encode_image(Patches(values, (1, rows, columns)))
        wanted = values.reshape(-1, 4, 1176).mean(axis=1)[:, :_H]
        assert embeds.shape == (rows * columns // 4, _H)
        assert np.abs(embeds[0] - wanted[0]).max() < 1e-6
    kept = embeds.copy()
    made.session.encode_image(Patches(values[:4] + 1, (1, 2, 2)))
    assert np.array_equal(embeds, kept)  # memory of its own
    with pytest.raises(SonoEdgeError, match="the picture has 20 patches and the largest vision engine takes 16"):
        made.session.encode_image(Patches(np.zeros((20, 1176), np.float32), (1, 2, 10)))


def test_wrong_calls_are_refused_and_nothing_is_lost(rig: Callable[..., Rig]) -> None:
    session = rig().session
    session.extend(*tokens(20))
    ids = np.array([0, IMAGE_TOKEN])
    with pytest.raises(SonoEdgeError, match="25 tokens do not fit the context of 24"):
        session.extend(*tokens(5))
    with pytest.raises(SonoEdgeError, match="holds 1 image tokens but the images give 2"):
        session.extend(ids, tokens(2)[1], image_embeds=np.zeros((2, _H), np.float32))
    with pytest.raises(SonoEdgeError, match=r"rows \[2\] of 2 tokens"):
        session.extend(*tokens(2), logits_rows=np.array([2]))
    with pytest.raises(SonoEdgeError, match="holds 20 tokens and cannot be rewound to 21"):
        session.rewind(21)
    session.rewind(0)
    late = np.ones((9, 9), np.bool_)
    with pytest.raises(SonoEdgeError, match="sees one that comes after it"):
        session.extend(*tokens(9), visible=late)
    assert session.length == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": SPEC.context - 1}, "the engines hold 23 tokens and the bundle promises a context of 24"),
        ({"decode": DECODE[:1]}, "has 2 optimization profiles and 1 buckets"),
        ({"decode": DECODE[::-1]}, r"attention_bias of optimization profile 0 is \[1, 1, 1, 12\], not \[1, 1, 1, 24\]"),
        ({"prefill": (Bucket(rows=4, seen=24, images=2, logits=1),)}, "takes 2 rows of pictures"),
    ],
)
def test_engines_that_do_not_hold_what_they_promise_are_refused(
    rig: Callable[..., Rig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SonoEdgeError, match=message):
        rig(**changes)


def test_engines_that_end_before_the_context_are_refused(rig: Callable[..., Rig], fake: Any, tmp_path: Path) -> None:
    made = rig()
    spec = msgspec.structs.replace(SPEC, context=26)
    plans = {"decoder": fake.decoder_plan(decoder, spec, PREFILL, in_place=True, capacity=34)}
    plans["decode"] = fake.decoder_plan(decoder, spec, DECODE, in_place=True, capacity=34)
    trt = fake.TensorRt(cuda := fake.Cuda(), made.plans | plans)
    with pytest.raises(SonoEdgeError, match="hold 24 tokens and the bundle promises a context of 26"):
        TensorRtSession(tmp_path, made.engines, ImageSpec(), spec, trt, cuda)
    assert cuda.allocations == 0


def test_a_plan_that_tensorrt_refuses(rig: Callable[..., Rig], tmp_path: Path) -> None:
    made = rig()
    (tmp_path / "decoder.plan").write_bytes(b"something else")
    with pytest.raises(SonoEdgeError, match=r"decoder\.plan: tensorrt 10\.16\.2 cannot load it: run `sonoedge engine`"):
        TensorRtSession(tmp_path, made.engines, ImageSpec(), SPEC, made.trt, made.cuda)


def test_memory_is_reckoned_before_anything_is_loaded(rig: Callable[..., Rig]) -> None:
    made = rig()
    plans = sum(engine.bytes for engine in made.engines.engines)
    cache = 2 * SPEC.layers * SPEC.kv_heads * SPEC.context * SPEC.head_dim * 2
    check_memory(made.engines, SPEC, plans + 512 + cache)
    with pytest.raises(SonoEdgeError, match=r"need .* GB of GPU memory .* and 0\.00 GB are free: end other programs"):
        check_memory(made.engines, SPEC, plans + 512 + cache - 1)


def test_no_memory_left_is_told_in_cudas_words(fake: Any, rig: Callable[..., Rig], tmp_path: Path) -> None:
    made = rig()
    cuda = fake.Cuda(free=600)
    with pytest.raises(SonoEdgeError, match=r"CUDA error 2 \(out of memory\)"):
        TensorRtSession(tmp_path, made.engines, ImageSpec(), SPEC, fake.TensorRt(cuda, made.plans), cuda)
    assert cuda.allocations == 0
