"""What makes hints trustworthy: temperatures, thresholds of silence and familiarity, fitted after INT8."""

from __future__ import annotations

import msgspec

from sonoedge.bundle import BundleWriter, HintCalibration
from sonoedge.calibration.confidence import expected_calibration_error
from sonoedge.calibration.conformal import calibrate
from sonoedge.calibration.known import fit_familiarity
from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.scores import score_pool
from sonoedge.export.recipe import Hints
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

FAMILIARITY = "familiarity.npz"


class Trust(msgspec.Struct, frozen=True):
    """Of every hint its calibration and the error that is left; the file that knows which images are familiar."""

    hints: dict[str, HintCalibration] = {}
    errors: dict[str, float] = {}
    familiarity: str | None = None


def fit_trust(
    session: Session, tokenizer: Tokenizer, known: PhantomPool, settings: Hints, writer: BundleWriter
) -> Trust:
    """Fit on frames whose truth is known, with the session that will serve."""
    scored = score_pool(session, tokenizer, known, "calibrate confidence")
    calibration = calibrate(scored, settings.least_accuracy, settings.coverage)
    errors = {h: expected_calibration_error(s, calibration[h]) for h, s in scored.hints.items()}
    regions = [truth.region for truth in scored.truths]
    fit_familiarity(scored.mean_embeds, settings.known_share, regions).save(writer.add(FAMILIARITY))
    return Trust(calibration, errors, FAMILIARITY)
