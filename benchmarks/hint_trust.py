"""How far a bundle's hints can be trusted: calibration, abstention, sets, and images of kinds never trained on.

python -m benchmarks.hint_trust BUNDLE [--frames 1000] [--refit] [--recipe demo]

Fresh phantoms of the trained regions, the two regions never trained on, and, where `../shared/data/pocus` is there, its
recordings of eyes (the sector alone). The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import typer

from sonoedge.bundle import HintCalibration, open_bundle
from sonoedge.calibration.confidence import answered, expected_calibration_error
from sonoedge.calibration.conformal import calibrate, covered, said_quality
from sonoedge.calibration.known import fit_familiarity
from sonoedge.calibration.phantom.truth import UNTRAINED_REGIONS
from sonoedge.calibration.pool import phantom_pool
from sonoedge.calibration.scores import HintScores, score_pool
from sonoedge.calibration.selective import auroc, risk_coverage
from sonoedge.errors import SonoEdgeError
from sonoedge.export.evaluate import open_model
from sonoedge.export.recipe import load_recipe
from sonoedge.runtime.familiarity import Familiarity, load_familiarity
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.look import Look, look_at
from sonoedge.runtime.sessions.base import Session

FIRST_FRAME_SEED = 9_100_000  # far from every recipe's
REFIT_SEED = 9_200_000
UNTRAINED_SEED = 9_300_000
UNTRAINED_FRAMES = 300
RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "pocus"
EVERY = 3  # frames of a recording


class HintTrust(msgspec.Struct, frozen=True):
    """One hint on frames that nothing was fitted on; shares from 0 to 1."""

    frames: int
    accuracy: float
    way: str
    error_before: float  # expected calibration error of the bare scores
    error: float
    spoken: float
    right_when_spoken: float
    aurc: float
    augrc: float
    coverage_promised: float | None
    coverage: float | None
    mean_set: float | None


class UnseenTrust(msgspec.Struct, frozen=True):
    """Pictures of a kind that was never trained on."""

    frames: int
    auroc: float
    recognised: float  # share beyond the threshold
    region_said: float  # share about which the region hint speaks nevertheless, one frame at a time


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    model: str
    refitted: bool
    known_passed: float  # share of known frames that is not called unseen
    hints: dict[str, HintTrust]
    unseen: dict[str, UnseenTrust]
    left_out: dict[str, str]  # what → why


def main(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose hints are measured.")],
    frames: Annotated[int, typer.Option(help="Fresh phantoms of trained regions.")] = 1000,
    refit: Annotated[bool, typer.Option(help="Fit calibration anew, on other fresh phantoms.")] = False,
    recipe: Annotated[str, typer.Option(help="Whose section [hints] --refit follows.")] = "demo",
) -> None:
    """Measure and print."""
    opened = open_bundle(bundle)
    session, tokenizer = open_model(bundle)
    calibration = dict(opened.manifest.hint_calibration)
    named = opened.manifest.familiarity
    with TemporaryDirectory(prefix="sonoedge-") as work:
        if refit:
            settings = load_recipe(recipe).hints
            if settings is None:
                raise SonoEdgeError(f"recipe {recipe} has no section [hints]: name one that has")
            pool = phantom_pool(Path(work), settings.frames, first_seed=REFIT_SEED, spec=session.image)
            fitted = score_pool(session, tokenizer, pool, "refit")
            calibration = calibrate(fitted, settings.least_accuracy, settings.coverage)
            familiarity = fit_familiarity(
                fitted.mean_embeds, settings.known_share, [truth.region for truth in fitted.truths]
            )
        elif named is None:
            raise SonoEdgeError(f"{bundle} knows no familiar pictures: build it with [hints], or give --refit")
        else:
            familiarity = load_familiarity(opened.path(named))
        pool = phantom_pool(Path(work), frames, first_seed=FIRST_FRAME_SEED, spec=session.image)
        scored = score_pool(session, tokenizer, pool, "score")
        quality = said_quality(scored)
        hints = {n: _hint(s, calibration.get(n, HintCalibration()), quality) for n, s in scored.hints.items()}
        known = np.array([familiarity.distance(row[None]) for row in scored.mean_embeds])
        engine = HintEngine(session, tokenizer, load_schema(), calibration=calibration, familiarity=familiarity)
        unseen = {}
        for region in UNTRAINED_REGIONS:
            pool = phantom_pool(
                Path(work), UNTRAINED_FRAMES, first_seed=UNTRAINED_SEED, spec=session.image, region=region
            )
            pictures = (pool[index].rgb() for index in range(len(pool)))
            unseen[region] = _unseen(session, engine, familiarity, known, pictures)
    left_out = {}
    recordings = sorted(p for p in RECORDINGS.glob("*") if p.suffix in (".mp4", ".png"))
    for path in recordings:
        unseen[path.stem] = _unseen(session, engine, familiarity, known, _sectors(path))
    if not recordings:
        left_out["recordings of eyes"] = f"there is no {RECORDINGS}"
    session.close()
    passed = float((known <= familiarity.threshold).mean())
    report = Report("hint_trust", opened.manifest.model.id, refit, passed, hints, unseen, left_out)
    _print(report)
    print(msgspec.json.encode(report).decode())


def _hint(scores: HintScores, calibration: HintCalibration, quality: npt.NDArray[np.str_] | None) -> HintTrust:
    confidence, right = answered(scores, calibration)
    spoken = confidence >= calibration.abstain_below
    curve = risk_coverage(confidence, right)
    inside, size = covered(scores, calibration, None if quality is None else quality[scores.frames])
    promised = calibration.coverage
    return HintTrust(
        frames=scores.right.size,
        accuracy=float(right.mean()),
        way="vector" if calibration.scale else "temperature" if calibration.platt is None else "platt",
        error_before=expected_calibration_error(scores, 1.0),
        error=expected_calibration_error(scores, calibration),
        spoken=float(spoken.mean()),
        right_when_spoken=float(right[spoken].mean()) if spoken.any() else 1.0,
        aurc=curve.aurc,
        augrc=curve.augrc,
        coverage_promised=promised,
        coverage=None if promised is None else float(inside.mean()),
        mean_set=None if promised is None else float(size.mean()),
    )


def _unseen(
    session: Session,
    engine: HintEngine,
    familiarity: Familiarity,
    known: npt.NDArray[np.float64],
    pictures: Iterator[npt.NDArray[np.uint8]],
) -> UnseenTrust:
    looks: list[Look] = [look_at(session, Frame(p, i, 0, None, "unseen")) for i, p in enumerate(pictures)]
    distances = np.array([familiarity.distance(look.embeds) for look in looks])
    said = [any(hint.hint == "region" and not hint.abstain for hint in engine.judge(look)) for look in looks]
    recognised = float((distances > familiarity.threshold).mean())
    return UnseenTrust(len(looks), auroc(known, distances), recognised, float(np.mean(said)))


def _sectors(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    """The sectors of a recording's frames."""
    video = cv2.VideoCapture(str(path))
    number = 0
    while True:
        read, picture = video.read()
        if not read:
            break
        if number % EVERY == 0:
            yield _sector(np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8))
        number += 1
    video.release()


def _sector(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The largest bright piece of a picture: what surrounds it, marks and writing, would give a recording away."""
    bright = (picture.max(axis=2) > 18).astype(np.uint8)
    bright = cv2.morphologyEx(bright, cv2.MORPH_CLOSE, np.ones((31, 31), np.uint8))
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, np.ones((41, 41), np.uint8))
    _, _, boxes, _ = cv2.connectedComponentsWithStats(bright)
    x, y, width, height = boxes[1 + int(np.argmax(boxes[1:, 4]))][:4]
    return np.ascontiguousarray(picture[y : y + height, x : x + width])


def _print(report: Report) -> None:
    print(f"{'hint':10}{'frames':>7}{'right':>7}{'ECE bare':>10}{'ECE':>7}{'spoken':>8}{'right then':>11}", end="")
    print(f"{'AURC':>8}{'AUGRC':>8}{'promised':>10}{'covered':>9}{'set':>6}  way")
    for name, hint in report.hints.items():
        print(f"{name:10}{hint.frames:7}{hint.accuracy:7.3f}{hint.error_before:10.4f}{hint.error:7.4f}", end="")
        print(f"{hint.spoken:8.3f}{hint.right_when_spoken:11.3f}{hint.aurc:8.4f}{hint.augrc:8.4f}", end="")
        if hint.coverage_promised is None or hint.coverage is None or hint.mean_set is None:
            print(f"{'no sets':>19}{'':6}  {hint.way}")
        else:
            print(f"{hint.coverage_promised:10.2f}{hint.coverage:9.3f}{hint.mean_set:6.2f}  {hint.way}")
    print(f"\nknown frames not called unseen: {report.known_passed:.3f}")
    print(f"{'never trained on':32}{'frames':>7}{'AUROC':>7}{'recognised':>12}{'region said':>13}")
    for name, one in report.unseen.items():
        print(f"{name:32}{one.frames:7}{one.auroc:7.3f}{one.recognised:12.3f}{one.region_said:13.3f}")
    for name, why in report.left_out.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    typer.run(main)
