"""`sonoedge build --preset`: a bundle for one region, what it tells of its cost, and what is refused."""

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.bundle import HINT_SCHEMA_FILE, open_bundle
from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.smoothing import Smoothing
from sonoedge.calibration.table import CalibrationTable
from sonoedge.errors import SonoEdgeError
from sonoedge.export import build, bundle_graphs, preset, preset_cost, recipe
from sonoedge.export.bundle_graphs import WEIGHTS
from sonoedge.export.checkpoint_files import image_spec
from sonoedge.export.corpus import PhantomCorpus, open_corpus
from sonoedge.export.fidelity.cases import PhantomCases
from sonoedge.export.fidelity.measure import measure
from sonoedge.export.fidelity.preset import INT8, PINNING, TOGETHER, PinnedExperts, PinnedLayer, preset_section
from sonoedge.export.layout import plan_layout
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.pinning import pinned_config
from sonoedge.export.preset import NOTED, Preset, PresetData, file_preset, pin_experts, require_preset
from sonoedge.export.quantize import make_plan
from sonoedge.export.routing_survey import Mixture, Use
from sonoedge.export.weight_file import write_weights
from sonoedge.runtime import hints
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 640
SETTINGS: dict[str, Any] = {
    "method": "merge",
    "experts": 2,
    "first_frame_seed": 500,
    "frames": 5,
    "compared_frames": 2,
}


@pytest.fixture(scope="module")
def smaller_graphs(tiny_checkpoint: Path, marked: Any) -> Any:
    """The decoder's graph with two experts, exported once; the vision tower is the same."""
    kept = {"model.layers.0.moe.experts": (0, 1)}
    return type(marked)(pinned_config(open_checkpoint(tiny_checkpoint)[0], kept), CONTEXT)


@pytest.fixture(scope="module")
def stand_in(marked: Any, smaller_graphs: Any) -> Iterator[None]:
    """Builds with two experts take that graph."""
    with pytest.MonkeyPatch.context() as patch:
        smaller_graphs.stand_in(patch)
        patch.setattr(bundle_graphs, "export_vision", lambda _config: marked.vision())
        patch.setattr(preset_cost, "measure", partial(measure, max_tokens=6))  # a random model never ends
        yield


def run(checkpoint: Path, written: Path, out: Path, region: str = "thyroid", data: str = "phantoms") -> dict[str, Any]:
    """Call the verb and give its JSON line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        build.run(checkpoint, "cpu-x86-64", str(written), data, out, preset=region, as_json=True)
    told: dict[str, Any] = msgspec.json.decode(printed.getvalue().splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], stand_in: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The smallest checkpoint built for the thyroid, two experts of four merged."""
    folder = tmp_path_factory.mktemp("preset")
    written = write_recipe(folder / "r.toml", preset=SETTINGS | {"least_answers": 0.01}, hints=None)
    return folder / "bundle", run(tiny_checkpoint, written, folder / "bundle")


def test_the_bundle_says_its_preset_and_holds_fewer_experts(
    built: tuple[Path, dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(built[0])
    config, headers = open_checkpoint(tiny_checkpoint)
    settings = recipe.load_recipe(built[0].parent / "r.toml")
    layout = plan_layout(config, make_plan(config, CalibrationTable.empty(), settings.quantization))
    write_weights(tmp_path / "whole", layout, headers, Smoothing.none(), identity="of a test")
    told, manifest = built[1]["preset"], bundle.manifest
    assert manifest.preset == told["region"] == "thyroid"
    schema = Path(str(hints.__file__)).parent / HINT_SCHEMA_FILE
    assert bundle.path(HINT_SCHEMA_FILE).read_bytes() == schema.read_bytes(), "not all hints are known"
    # One expert of the smallest checkpoint: three projections of 48 by 64, in each of 3 layers; and a router's row.
    whole = sum(header.parameters for header in headers.values())
    assert whole - manifest.model.parameters == 3 * 2 * (3 * 48 * 64 + 64)
    before, after = (path.stat().st_size for path in (tmp_path / "whole", bundle.path(WEIGHTS)))
    assert told["weights_bytes_before"] == before, "not the size of the file with all experts"
    assert told["weights_bytes_after"] == after
    assert before - after > 3 * 2 * 3 * 48 * 64  # int8 and scales
    assert all(len(kept) == 2 for kept in told["kept"].values())
    assert all(0.5 <= mass <= 1 for mass in told["mass_kept"].values())
    assert sorted(path.name for path in built[0].parent.iterdir()) == ["bundle", "r.toml"], "work is left behind"


def test_the_report_tells_pinning_int8_and_both_apart(built: tuple[Path, dict[str, Any]]) -> None:
    bundle = open_bundle(built[0])
    report = msgspec.json.decode(bundle.path("reports/preset.json").read_bytes())
    assert report["reference"] == "float with all experts"
    assert report["shipped"] == TOGETHER
    assert report["missed"] == []
    assert set(report["variants"]) == {TOGETHER, PINNING, INT8}
    kl = {name: found["divergence"]["mean"] for name, found in report["variants"].items()}
    assert kl == pytest.approx({name: cost["kl"] for name, cost in built[1]["preset"]["costs"].items()}, rel=1e-3)
    assert 0 < kl[INT8] < kl[PINNING], "int8 of random experts is far closer than two experts to four"
    assert kl[TOGETHER] > kl[INT8]
    assert all(found["answers"]["overall"] <= 1 for found in report["variants"].values())
    layer = report["preset"]["layers"][0]
    assert sum(layer["image"]) == pytest.approx(1, abs=1e-3)
    assert sum(layer["elsewhere"]) == pytest.approx(1, abs=1e-3)
    assert report["preset"]["tokens"] > 5 * 9
    page = bundle.path("reports/preset.html").read_text()
    assert "Experts pinned for thyroid" in page
    assert "Routing follows" in page
    assert f"{built[1]['preset']['weights_bytes_before']:,}" in page


def test_golden_cases_are_the_pinned_models(built: tuple[Path, dict[str, Any]]) -> None:
    """A bound that had the cost of pinning in it would let a broken engine pass."""
    assert built[1]["golden_error"] < open_bundle(built[0]).manifest.golden.bound < 0.2


def test_a_floor_that_is_missed_leaves_the_report_and_no_bundle(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], stand_in: None, tmp_path: Path
) -> None:
    written = write_recipe(tmp_path / "r.toml", preset=SETTINGS | {"largest_kl": 1e-9}, hints=None)
    with pytest.raises(
        SonoEdgeError, match=r"mean KL is .* at most 1e-09 \(largest_kl\): see .*preset.html, then keep"
    ):
        run(tiny_checkpoint, written, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.reports", "r.toml"]


def test_where_no_graph_can_run_pinning_alone_is_measured(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], stand_in: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(build._Job, "fits", property(lambda _job: False))
    written = write_recipe(tmp_path / "r.toml", preset=SETTINGS | {"largest_kl": 1.0}, hints=None)
    with pytest.raises(SonoEdgeError, match=r"\[preset\] has floors, and .* do not fit in this machine's memory"):
        run(tiny_checkpoint, written, tmp_path / "bundle")
    build.run(
        tiny_checkpoint, "cpu-x86-64", str(write_recipe(written, preset=SETTINGS, hints=None)), "phantoms",
        tmp_path / "bundle", preset="thyroid", as_json=False,
    )  # fmt: skip
    report = msgspec.json.decode((tmp_path / "bundle" / "reports" / "preset.json").read_bytes())
    assert list(report["variants"]) == [PINNING]
    found = report["variants"][PINNING]
    assert found["divergence"]["mean"] > 0
    assert "does not fit in memory" in found["not_measured"]["answers"]
    said = capfd.readouterr().out
    assert "2 of 4 experts a layer for thyroid (merge): " in said
    assert f"of {report['preset']['weights_bytes_before']:,} bytes of weights saved" in said
    assert f"  {PINNING}: KL {found['divergence']['mean']:.3g}, top-1 " in said
    assert "answers equal" not in said, "no answer was given"


@pytest.fixture
def data(tiny_checkpoint: Path, frames: PhantomPool) -> Callable[..., PresetData]:
    """A preset on a few phantoms, whatever they show."""

    def make(**changes: Any) -> PresetData:
        asked = {key: value for key, value in (SETTINGS | {"method": "pin"} | changes).items() if value is not None}
        settings = msgspec.convert(asked, recipe.Preset)
        few = PhantomPool(100, frames.greys[:3], frames.classes[:3], frames.truths[:3])
        corpus = PhantomCorpus(few, image_spec(tiny_checkpoint))
        return PresetData("thyroid", settings, corpus, None, corpus, PhantomCases(few))

    return make


def test_a_halted_build_finds_its_pinned_checkpoint_again(
    tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, data: Callable[..., PresetData], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = image_spec(tiny_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(preset, "write_pinned", lambda *_: (_ for _ in ()).throw(OSError("halted")))
        with pytest.raises(OSError, match="halted"):
            pin_experts(tiny_checkpoint, data(), tiny_tokenizer, spec, CONTEXT, tmp_path)
    assert not (tmp_path / NOTED).exists()
    first = pin_experts(tiny_checkpoint, data(), tiny_tokenizer, spec, CONTEXT, tmp_path)
    monkeypatch.setattr(preset, "survey_routing", lambda *_: pytest.fail("measured again"))
    assert pin_experts(tiny_checkpoint, data(), tiny_tokenizer, spec, CONTEXT, tmp_path) == first


@pytest.mark.parametrize("method", ["pin", "merge"])
def test_all_of_the_mass_needs_all_experts_and_is_the_same_model(
    tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, data: Callable[..., PresetData], tmp_path: Path, method: str
) -> None:
    asked = data(method=method, experts=None, mass=1.0)
    pinned = pin_experts(tiny_checkpoint, asked, tiny_tokenizer, image_spec(tiny_checkpoint), CONTEXT, tmp_path)
    assert set(pinned.kept.values()) == {(0, 1, 2, 3)}
    assert pinned.bytes_before == pinned.bytes_after
    found = (tmp_path / preset.CHECKPOINT / "model.safetensors").read_bytes()
    header = int.from_bytes(found[:8], "little")
    assert len(found) - 8 - header == pinned.bytes_after


def conversations(folder: Path, regions: list[str | None]) -> Path:
    """A conversation file with one case for each region, None: the case does not say it."""
    cv2.imwrite(str(folder / "0.png"), np.random.default_rng(1).integers(0, 255, (60, 90, 3), np.uint8))
    turns = [{"from": "human", "value": "<image>Which region is shown?"}, {"from": "gpt", "value": "liver"}]
    cases = [
        {"id": number, "image": ["0.png"], "conversations": turns} | ({} if region is None else {"region": region})
        for number, region in enumerate(regions)
    ]
    (folder / "cases.json").write_bytes(msgspec.json.encode(cases))
    return folder / "cases.json"


def of_file(path: Path, **changes: Any) -> PresetData:
    settings = msgspec.convert(SETTINGS | {"frames": 3, "compared_frames": 2} | changes, recipe.Preset)
    return file_preset(path, open_corpus(str(path), ImageSpec(), None), Preset("thyroid", settings))


def test_cases_of_a_file_are_measured_or_compared_and_never_both(tmp_path: Path) -> None:
    regions = ["thyroid", "liver", None, "thyroid", "thyroid", "liver", "thyroid", "thyroid", "thyroid", "heart"]
    found = of_file(conversations(tmp_path, regions))
    rng = np.random.default_rng(0)
    measured, compared = ({c.sample(i, rng).name for i in range(len(c))} for c in (found.corpus, found.held))
    assert (len(measured), len(compared)) == (3, 2)
    assert not measured & compared
    assert [found.cases[index].name for index in range(2)] == [
        found.held.sample(index, rng).name.split()[1] for index in range(2)
    ]
    assert {found.corpus.region(index) for index in range(3)} == {"thyroid"}
    assert found.elsewhere is not None
    assert [found.elsewhere.region(index) for index in range(len(found.elsewhere))] == ["liver", "liver", "heart"]


def test_data_without_the_region_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"does not say which region .* key \"region\", or calibrate on phantoms"):
        of_file(conversations(tmp_path, [None] * 6))
    with pytest.raises(
        SonoEdgeError, match=r"ask for 5 cases of thyroid and .* holds 1 beside heart, liver: give more"
    ):
        of_file(conversations(tmp_path, ["liver", "thyroid", "heart"]))
    frames = open_corpus(str(tmp_path / "0.png"), ImageSpec(), None)
    settings = msgspec.convert(SETTINGS, recipe.Preset)
    with pytest.raises(SonoEdgeError, match="does not say which region its samples show"):
        file_preset(tmp_path / "0.png", frames, Preset("thyroid", settings))


REFUSALS: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "an unknown region": ("elbow", SETTINGS, "unknown preset 'elbow': choose breast, gynaecology, heart, kidney, "),
    "a recipe without the section": ("heart", None, "--preset heart needs a [preset] section, which the recipe"),
    "more experts than there are": (
        "heart",
        SETTINGS | {"experts": 5},
        "preset.experts = 5 and the model has 4 in a layer: ask for at most 4",
    ),
}


@pytest.mark.parametrize(("region", "section", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_pinned_is_refused_at_once(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, region: str,
    section: dict[str, Any] | None, words: str, sonoedge: Any,
) -> None:  # fmt: skip
    written = write_recipe(tmp_path / "r.toml", preset=section)
    ran = sonoedge(
        "build", tiny_checkpoint, "--profile", "cpu-x86-64", "--recipe", written, "--calibration", "phantoms",
        "--preset", region, "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert words in ran.err
    assert "render" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_a_dense_model_is_refused(small_config: ModelConfig) -> None:
    dense = msgspec.structs.replace(small_config, moe=None)
    with pytest.raises(
        SonoEdgeError, match=r"--preset liver pins experts and a dense Qwen2VL.* has none: leave it out"
    ):
        require_preset("liver", recipe.load_recipe("demo"), dense)


def test_experts_and_mass_exclude_each_other(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    for changed in ({"mass": 0.9}, {"experts": None}):
        section = {key: value for key, value in (SETTINGS | changed).items() if value is not None}
        path = write_recipe(tmp_path / "r.toml", preset=None)
        lines = "".join(f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in section.items())
        path.write_text(f"{path.read_text()}[preset]\n{lines}")
        with pytest.raises(SonoEdgeError, match=r"r.toml is wrong: preset: give one of the keys `experts` and `mass`"):
            recipe.load_recipe(path)


def test_the_section_says_what_routing_follows() -> None:
    image, text = Use(2, (2, 0, 2, 0), (1.5, 0.0, 0.5, 0.0)), Use(2, (0, 2, 0, 2), (0.0, 1.0, 0.0, 1.0))
    alike = Mixture("<m>", image, text, image + text)
    layers = (PinnedLayer.of(alike, (0, 1)),)
    pinned = PinnedExperts("liver", "pin", 4, layers, 1000, 600, 4000, 2000)
    assert pinned.least_mass_kept == pytest.approx(2.5 / 4)
    assert "Routing follows text against image more than region: 100% of" in pinned.verdict
    assert "0% between liver and other regions; in 1 of 1 layers" in pinned.verdict
    assert "400 (40.0%)" in preset_section(pinned)
    assert "&lt;m&gt;" in preset_section(pinned)
    own = Mixture("m", image, image, text)
    assert "region more than text" in msgspec.structs.replace(pinned, layers=(PinnedLayer.of(own, (0, 2)),)).verdict
    lonely = msgspec.structs.replace(pinned, layers=(PinnedLayer.of(Mixture("m", image, text), (0, 2)),))
    assert "holds no other region" in lonely.verdict
    assert "not measured" in preset_section(lonely)
