"""What a frame of which nothing is known is asked, with answers that are possible, not right: to measure with only.

At the scanner every candidate answer of every hint runs through the model, right or wrong, and reports are long; ranges
measured on questions alone would miss both.
"""

from __future__ import annotations

import numpy as np

from sonoedge.calibration.phantom import KINDS, QUALITIES, REGIONS, Lesion, Truth
from sonoedge.calibration.phantom_text import closed_questions, report
from sonoedge.export.packing import Branch
from sonoedge.runtime.hints import LANGUAGES

SIZE_PX = 224
WITHOUT_LESION = 5  # every fifth


def possible_branches(index: int, rng: np.random.Generator) -> tuple[Branch, ...]:
    """The hints' questions and a report about frame `index`, frame by frame in the other language.

    Answers take turns, so that 32 frames meet all of them in both languages; `rng` chooses the report's phrasing.
    """
    turn, language = index // len(LANGUAGES), LANGUAGES[index % len(LANGUAGES)]
    truth = _possible(turn)
    asked = [
        Branch(question.question, question.answer, question.name) for question in closed_questions(truth, language)
    ]
    return (*asked, Branch(*report(truth, language, rng)))


def _possible(turn: int) -> Truth:
    """A truth that a frame could have."""
    depth_px = SIZE_PX * (1 + 2 * (turn // 3 % 2)) / 4
    lesion = Lesion(
        kind=KINDS[turn % len(KINDS)],
        side="left" if turn // 2 % 2 else "right",
        radius_px=SIZE_PX / 10,
        size_mm=5.0 * (1 + turn % 6),
        depth_mm=depth_px,
        centre_px=(SIZE_PX / 4, depth_px),
    )
    return Truth(
        region=REGIONS[turn % len(REGIONS)],
        quality=QUALITIES[turn // 2 % len(QUALITIES)],
        geometry="linear",
        spacing_mm=1.0,
        lesion=None if turn % WITHOUT_LESION == WITHOUT_LESION - 1 else lesion,
        seed=0,
        size=SIZE_PX,
    )
