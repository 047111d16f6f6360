"""The TensorRT session over a built bundle's own graphs, which ONNX Runtime runs in the place of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.bundle import Bundle, open_bundle
from sonoedge.engine_manifest import Bucket, Engine, EngineSet, Golden
from sonoedge.runtime.golden import GoldenCase, check_session, load_case
from sonoedge.runtime.preprocess import Patches
from sonoedge.runtime.sessions.masks import attention_bias
from sonoedge.runtime.sessions.ort import load_graph, patch_places
from sonoedge.runtime.sessions.tensorrt import TensorRtSession

Arrays = dict[str, npt.NDArray[Any]]
VISION = (Bucket(rows=1024),)


def runner(path: Path) -> Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]:
    """A graph as an engine's work."""
    session = load_graph(path, 1)
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        feed = {name: np.array(array) for name, array in inputs.items()}
        return dict(zip(names, session.run(names, feed), strict=True))

    return run


@pytest.fixture(scope="module")
def bundle(tiny: Any) -> Bundle:
    return open_bundle(tiny.bundle)


@pytest.fixture(scope="module")
def case(bundle: Bundle) -> GoldenCase:
    return load_case(bundle.path("golden/0.npz"))


def open_on_fakes(bundle: Bundle, folder: Path, fake: Any, formulation: str) -> TensorRtSession:
    """The session with small engines: a golden case takes several runs of each kind."""
    spec, in_place = bundle.manifest.decoder, formulation == "trt"
    ends = (64, spec.context) if in_place else (spec.context,)
    buckets = tuple(
        Bucket(rows=rows, seen=end if in_place else end + rows, images=rows, logits=min(rows, 16))
        for rows in (1, 24, 40)
        for end in ends
    )
    plans = {
        "vision": fake.vision_plan(runner(bundle.graph("vision", formulation)), spec.hidden, VISION),
        "decoder": fake.decoder_plan(
            runner(bundle.graph("decoder", formulation)), spec, buckets, in_place=in_place, capacity=spec.context
        ),
    }
    engines = []
    for stage, sizes in (("vision", VISION), ("decoder", buckets)):
        (folder / f"{stage}.plan").write_bytes(stage.encode())
        engines.append(Engine(stage, f"{stage}.plan", "", 1, sizes, in_place, None))  # type: ignore[arg-type]
    made = EngineSet(
        profile="jetson-orin-nano-8gb",
        sm=87,
        builder="tensorrt",
        builder_version="10.16.2",
        driver=None,
        model=bundle.manifest.model.id,
        experts="functions",
        kernels=None,
        engines=tuple(engines),
        golden=Golden("not run"),
    )
    cuda = fake.Cuda()
    return TensorRtSession(folder, made, bundle.manifest.image, spec, fake.TensorRt(cuda, plans), cuda)


def in_one_pass(bundle: Bundle, case: GoldenCase, formulation: str) -> npt.NDArray[Any]:
    """Logits [s, vocab] of the graphs themselves, no token padded and no cache used."""
    spec, (t, h, w) = bundle.manifest.decoder, map(int, case.grid)
    feed: Arrays = {"patches": case.patches, "places": patch_places((t, h, w), bundle.manifest.image.merge_size)}
    embeds = runner(bundle.graph("vision", formulation))(feed)["image_embeds"]
    tokens, in_place = len(case.ids), formulation == "trt"
    kind, past = (np.float16, spec.context) if in_place else (np.float32, 0)
    empty = np.zeros((1, spec.kv_heads, past, spec.head_dim), kind)
    inputs: Arrays = {
        "input_ids": case.ids[None],
        "positions": case.positions[:, None],
        "image_embeds": embeds,
        "attention_bias": attention_bias(np.tri(tokens, dtype=np.bool_), np.arange(tokens), (tokens, tokens), kind),
        "logits_rows": np.arange(tokens),
        **({"write_at": np.array([0])} if in_place else {}),
        **{f"past_{part}_{layer}": empty for layer in range(spec.layers) for part in ("key", "value")},
    }
    return runner(bundle.graph("decoder", formulation))(inputs)["logits"]


@pytest.mark.parametrize("formulation", ["trt", "qdq"])
def test_a_bundle_in_chunks_gives_what_its_graphs_give(
    bundle: Bundle, case: GoldenCase, fake: Any, tmp_path: Path, formulation: str
) -> None:
    """With the cache in place, and grown as for a TensorRT that cannot: a level of int8 may fall to the other side."""
    session = open_on_fakes(bundle, tmp_path, fake, formulation)
    found, wanted = case.run(session), in_one_pass(bundle, case, formulation)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    recorded = check_session(bundle, session)
    print(f"{formulation}: relative error {error:.3g}, of the recorded outputs {recorded:.3g}")
    assert error < 0.02
    assert recorded <= bundle.manifest.golden.bound
    session.close()


def test_pictures_keep_their_places(bundle: Bundle, case: GoldenCase, fake: Any, tmp_path: Path) -> None:
    session = open_on_fakes(bundle, tmp_path, fake, "qdq")
    t, h, w = map(int, case.grid)
    embeds = session.encode_image(Patches(case.patches, (t, h, w)))
    feed: Arrays = {"patches": case.patches, "places": patch_places((t, h, w), 2)}
    assert np.array_equal(embeds, runner(bundle.graph("vision", "qdq"))(feed)["image_embeds"])
