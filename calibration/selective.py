"""How well confidence tells right answers from wrong ones, and known pictures from unseen ones."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt


class RiskCoverage(msgspec.Struct, frozen=True):
    """What a hint costs when it speaks about its most confident frames only, for every share of frames spoken about.

    Sources: Y. Geifman et al., "Bias-Reduced Uncertainty Estimation" (arXiv 1805.08206) for AURC; J. Traub et al.,
    "Overcoming Common Flaws in the Evaluation of Selective Classification Systems" (arXiv 2407.01032) for AUGRC.
    """

    coverage: tuple[float, ...]  # share of frames spoken about
    risk: tuple[float, ...]  # share wrong among them
    aurc: float  # mean of that risk
    augrc: float  # mean of the share of all frames that is spoken about wrongly


def risk_coverage(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> RiskCoverage:
    """The curve over frames [n]; frames of equal confidence are spoken about together, at their mean risk."""
    order = np.argsort(-confidence, kind="stable")
    levels, group = np.unique(-confidence[order], return_inverse=True)
    wrong_share = np.bincount(group, weights=~correct[order]) / np.bincount(group, minlength=levels.size)
    wrong = np.cumsum(wrong_share[group])  # [n]
    count = np.arange(1, order.size + 1)
    return RiskCoverage(
        tuple(map(float, count / order.size)),
        tuple(map(float, wrong / count)),
        float((wrong / count).mean()),
        float((wrong / order.size).mean()),
    )


def auroc(known: npt.NDArray[np.float64], unseen: npt.NDArray[np.float64]) -> float:
    """The chance that a picture of an unseen kind [m] gets a larger distance than a known one [n]; ties count half."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, unseen, side="left") + np.searchsorted(ordered, unseen, side="right")
    return float(below.mean() / (2 * known.size))
