"""How well the sector of a screen is found, and which frames are called not worth asking about.

python -m benchmarks.sector [--layouts 300] [--frames 8] [--gate 200]

Screens and bad frames are made with random seeds; the outline is compared with the sector that was drawn, from the
first frame and after `frames`. Where `../shared/data` is there, its pictures are counted as frames that must pass.
The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import typer

from sonoedge.calibration.phantom import QUALITIES, REGIONS, UNTRAINED_REGIONS, phantom
from sonoedge.calibration.phantom.bad import black, in_air, poor_contact
from sonoedge.calibration.phantom.screen import Screen, screen
from sonoedge.calibration.phantom.truth import GEOMETRIES
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.frame_gate import verdict
from sonoedge.runtime.sector.tracker import SectorTracker
from sonoedge.runtime.sector.view import View, cells_of, sampled
from sonoedge.runtime.sight import LOOKING, Eye

FIRST_SEED = 80_000  # far from those that thresholds were looked at with
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LIVE = 8  # grey levels
FAIR_IOU = 0.85
Image = npt.NDArray[np.uint8]


class Layout(msgspec.Struct, frozen=True):
    """One screen after some of its frames."""

    geometry: str
    sure: bool
    iou: float
    lost: float  # share of live pixels that is cut away
    let_through: float  # share of the pixels of writing that stays


class Outlines(msgspec.Struct, frozen=True):
    """Layouts of one geometry; the shares and the IoU are of those that were sure."""

    layouts: int
    unsure: float
    iou_median: float
    iou_p5: float
    sure_below_fair: float  # said to be sure, with an IoU under 0.85
    lost_p95: float
    lost_max: float
    leaking: float  # share of layouts that let any writing through
    let_through_mean: float


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    first_frame: dict[str, Outlines]
    later: dict[str, Outlines]
    false_alarms: dict[str, float]  # share of fine pictures that are called poor
    changed: dict[str, float]  # share of bare pictures that are cut or hidden
    detected: dict[str, float]  # share of bad frames that are called so, the sector known
    detected_first: dict[str, float]  # and as the first frame of a feed
    locked_ms: dict[str, float]  # a frame, by size
    search_ms: float


def main(
    layouts: Annotated[int, typer.Option(help="Random screens.")] = 300,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 8,
    gate: Annotated[int, typer.Option(help="Bad frames of each kind.")] = 200,
) -> None:
    """Measure and print."""
    cv2.setNumThreads(1)
    first, later, searches = [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + layouts):
        try:
            made = screen(seed, frames)
        except SonoEdgeError:  # a scene whose lesion cannot be seen
            continue
        tracker = SectorTracker()
        for number, image in enumerate(made.images):
            began = time.perf_counter()
            view = tracker.see(image)
            searches += [(time.perf_counter() - began) * 1e3] if number == 0 else []
            if number == 0:
                first.append(_layout(made, view))
        later.append(_layout(made, tracker.view))
    fine = dict(_fine())
    judged = {name: [_first(image) for image in images] for name, images in fine.items()}
    report = Report(
        benchmark="sector",
        first_frame=_grouped(first),
        later=_grouped(later),
        false_alarms={name: _share(poor is not None for poor, _ in seen) for name, seen in judged.items()},
        changed={name: _share(not same for _, same in seen) for name, seen in judged.items()},
        detected=_detected(gate),
        detected_first={
            make.__name__: _share(_first(make(seed).image)[0] not in (None, LOOKING) for seed in range(gate))
            for make in (in_air, poor_contact, black)
        },
        locked_ms={f"{width}x{height}": _locked_ms(width, height) for width, height in ((640, 480), (1920, 1080))},
        search_ms=statistics.median(searches),
    )
    _print(report)
    print(msgspec.json.encode(report).decode())


def _layout(made: Screen, view: View | None) -> Layout:
    if view is None:
        return Layout(made.geometry, False, 0.0, 1.0, 0.0)
    shown = view.allowed > 0 if view.inside is not None else np.ones(made.sector.shape, np.bool_)
    live = made.sector & (np.max([image.max(axis=2) for image in made.images], axis=0) > LIVE)
    return Layout(
        made.geometry,
        True,
        float((shown & made.sector).sum() / (shown | made.sector).sum()),
        float((live & ~shown).sum() / max(1, live.sum())),
        float((shown & made.writing).sum() / max(1, made.writing.sum())),
    )


def _grouped(layouts: list[Layout]) -> dict[str, Outlines]:
    groups = {name: [one for one in layouts if one.geometry == name] for name in GEOMETRIES} | {"all": layouts}
    return {name: _summary(group) for name, group in groups.items() if any(one.sure for one in group)}


def _summary(layouts: list[Layout]) -> Outlines:
    sure = [one for one in layouts if one.sure]
    iou, lost = np.array([one.iou for one in sure]), np.array([one.lost for one in sure])
    through = np.array([one.let_through for one in sure])
    return Outlines(
        layouts=len(layouts),
        unsure=1 - len(sure) / len(layouts),
        iou_median=float(np.median(iou)),
        iou_p5=float(np.quantile(iou, 0.05)),
        sure_below_fair=float((iou < FAIR_IOU).sum() / len(layouts)),
        lost_p95=float(np.quantile(lost, 0.95)),
        lost_max=float(lost.max()),
        leaking=float((through > 0).mean()),
        let_through_mean=float(through.mean()),
    )


def _fine() -> Iterator[tuple[str, list[Image]]]:
    """Pictures that must pass as they are."""
    for quality in QUALITIES:
        made = [
            phantom(FIRST_SEED + seed, region=region, quality=quality).image
            for region in (*REGIONS, *UNTRAINED_REGIONS)
            for seed in range(12)
        ]
        yield f"phantoms, {quality}", made
    if stills := sorted(DATA.glob("busi/images/*.png")):
        yield "BUSI", [np.ascontiguousarray(np.asarray(cv2.imread(str(path)), np.uint8)) for path in stills[::2]]


def _first(image: Image) -> tuple[str | None, bool]:
    """The verdict on a still picture, and whether it is shown unchanged."""
    sight = Eye().see(Frame(image, 0, 0, None, "benchmark", still=True))
    return sight.poor, np.array_equal(sight.frame.image, image)


def _detected(count: int) -> dict[str, float]:
    """Bad frames whose outline is known, as it is once a feed is locked."""
    shares = {}
    for make in (in_air, poor_contact, black):
        said = []
        for seed in range(count):
            bad = make(seed)
            field = bad.geometry.field * np.uint8(255)
            height, width = (int(np.ptp(np.flatnonzero(field.any(axis=axis)))) for axis in (1, 0))
            known = SectorTracker().see(np.asarray(cv2.merge([_lit(field)] * 3), np.uint8), still=True)
            if known is None or height * width == 0:
                continue
            sample = sampled(bad.image, 160)
            said.append(verdict(sample, cells_of(known, *sample.shape)) is not None)
        shares[make.__name__] = _share(said)
    return shares


def _lit(field: Image) -> Image:
    """A sector full of speckle."""
    return np.asarray(np.random.default_rng(0).integers(40, 200, field.shape) * (field > 0), np.uint8)


def _locked_ms(width: int, height: int) -> float:
    made = screen(FIRST_SEED, 24, jpeg=False)
    images = [np.asarray(cv2.resize(image, (width, height)), np.uint8) for image in made.images]
    eye, spent = Eye(), []
    for number in range(240):
        frame = Frame(images[number % 24], number, number * 33_000_000, None, "benchmark", flipped=False)
        began = time.perf_counter()
        eye.see(frame)
        spent.append((time.perf_counter() - began) * 1e3)
    return statistics.median(spent[40:])


def _share(flags: Iterable[bool]) -> float:
    every = list(flags)
    return sum(every) / max(1, len(every))


def _print(report: Report) -> None:
    for title, groups in (("first frame", report.first_frame), ("later", report.later)):
        print(f"{title:14}{'layouts':>8}{'unsure':>8}{'IoU':>7}{'p5':>7}{'sure<.85':>10}", end="")
        print(f"{'lost p95':>10}{'max':>7}{'leaking':>9}{'let through':>13}")
        for name, one in groups.items():
            print(f"{name:14}{one.layouts:8}{one.unsure:8.3f}{one.iou_median:7.3f}{one.iou_p5:7.3f}", end="")
            print(f"{one.sure_below_fair:10.3f}{one.lost_p95:10.4f}{one.lost_max:7.3f}", end="")
            print(f"{one.leaking:9.3f}{one.let_through_mean:13.5f}")
    print("false alarms", report.false_alarms, "changed", report.changed)
    print("detected", report.detected, "as the first frame", report.detected_first)
    print("ms a frame, locked", report.locked_ms, "search", report.search_ms)


if __name__ == "__main__":
    typer.run(main)
