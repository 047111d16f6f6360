"""Every graph of the smallest student, as the verb `build` wrote it, is built by TensorRT-RTX and looked into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sonoedge import device_profiles
from sonoedge.bundle import open_bundle
from sonoedge.device_profiles.schema import Buckets
from sonoedge.engine_manifest import engines_folder, read_engines
from sonoedge.export.engines import engine
from sonoedge.export.engines.builder import Built, Target, build_engine
from sonoedge.export.engines.library import Abilities
from sonoedge.export.engines.stages import plan_stages

if TYPE_CHECKING:
    from types import ModuleType

    TinyBundle = Any  # the fixture's type is in tests/conftest.py, which no test can import

FEW = Buckets((196,), (64,), (640,))


@pytest.fixture(scope="module")
def few_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workstation with one size of each kind, which is built three times as fast."""
    text = (Path(device_profiles.__file__).parent / "rtx-sm86.toml").read_text()
    for name, sizes in (("image", "[64, 196]"), ("prefill", "[32, 256, 1024]"), ("context", "[512, 2048, 4096]")):
        few = {"image": "[196]", "prefill": "[64]", "context": "[640]"}[name]
        assert f"{name}_tokens = {sizes}" in text
        text = text.replace(f"{name}_tokens = {sizes}", f"{name}_tokens = {few}")
    path = tmp_path_factory.mktemp("profile") / "few.toml"
    path.write_text(text.replace('id = "rtx-sm86"', 'id = "few"'))
    return path


def test_the_engines_of_the_student_multiply_in_int8(
    tiny: TinyBundle, few_sizes: Path, tensorrt_rtx: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))  # other tests read the same one
    engine.run(root, str(few_sizes), False, as_json=True)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = read_engines(engines_folder(root, "few"))
    assert written.model == open_bundle(root).manifest.model.id
    assert written.experts == "functions"
    vision, decoder = (made["products"] for made in told["engines"])
    assert decoder["int8"] > 40
    assert decoder["not_int8"] == decoder["unpacked"] == vision["unpacked"] == []
    assert vision["int8"] > 9
    assert vision["not_int8"] == []


def build(stage: str, tiny: TinyBundle, target: Target, tmp_path: Path) -> Built:
    """Build a portable graph as a library without the newer operators would."""
    plan = plan_stages(open_bundle(tiny.bundle), FEW, Abilities(plugins=False, cache_in_place=False, decode_rows=2))
    (wanted,) = (planned for planned in plan.stages if planned.name == stage)
    assert not wanted.cache_in_place
    return build_engine(target, wanted.graph, tmp_path / wanted.plan, wanted.extents)


def test_the_portable_vision_graph_is_built(tiny: TinyBundle, target: Target, tmp_path: Path) -> None:
    built = build("vision", tiny, target, tmp_path)
    assert built.products.int8 > 9
    assert built.products.not_int8 == built.products.unpacked == ()


def test_the_portable_decoder_graph_is_built_with_a_cache_that_grows(
    tiny: TinyBundle, target: Target, tmp_path: Path
) -> None:
    built = build("decoder", tiny, target, tmp_path)
    assert built.products.int8 > 40
    assert built.products.not_int8 == built.products.unpacked == ()
