"""What is asked in an evaluation: cases of a conversation file or a labelled folder, and phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.case_pictures import read_case_picture
from sonoedge.calibration.labelled_folder import read_answered
from sonoedge.calibration.phantom_text import diagnosis, report, report_phrasings
from sonoedge.calibration.phantom_wording import NO_LESION
from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.questions import Question, Task, options, questions
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import LANGUAGES, load_schema

SHARPNESS_PX = 256  # the longer side of a picture when its sharpness is measured


class Case(msgspec.Struct, frozen=True):
    """One or more pictures uint8 [H, W, 3], RGB, and what is asked about them; `quality` where it is known."""

    name: str
    images: tuple[npt.NDArray[np.uint8], ...]
    questions: tuple[Question, ...]
    region: str | None = None
    quality: str | None = None


class Cases(Protocol):
    """Cases that can be drawn by index, the same each time."""

    def __len__(self) -> int:
        """How many cases there are."""
        ...

    def __getitem__(self, index: int) -> Case:
        """Case `index`; raises SonoEdgeError naming a picture that cannot be read."""
        ...


class FileCases:
    """The cases of a conversation file or a labelled folder that have pictures and a right answer."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        """Read the cases, at most `limit`; raises SonoEdgeError as their readers do, and when none is left."""
        with_pictures = [
            case for case in read_answered(path) if case.image and any(a.strip() for _, a in case.exchanges)
        ]
        self.left_out = len(with_pictures[limit:]) if limit is not None else 0
        self.conversations = with_pictures[:limit]
        if not self.conversations:
            raise SonoEdgeError(f"--data {path}: no case has both a picture and an answer: add some")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Case:
        case = self.conversations[index]
        asked = tuple(question for question in questions(case) if question.references[0])
        quality = None if case.phantom is None else case.phantom.quality
        return Case(
            str(case.id), tuple(read_case_picture(Path(path)) for path in case.image), asked, case.shown, quality
        )


class PhantomCases:
    """Phantoms: one single choice of the finding and one report each, frame by frame in the other language."""

    left_out = 0

    def __init__(self, pool: PhantomPool) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, index: int) -> Case:
        frame, language = self._pool[index], LANGUAGES[index % len(LANGUAGES)]
        choice = diagnosis(frame.truth, language, np.random.default_rng(frame.truth.seed))
        kinds = {candidate.text.get(language): candidate.id for candidate in load_schema().hint("kind").candidates}
        kinds[NO_LESION[language]] = "none"
        named = [kinds[words] for words in options(choice.question).values()]
        wanted, _ = report(frame.truth, language)
        return Case(
            name=f"phantom {frame.truth.seed}",
            images=(frame.rgb(),),
            questions=(
                Question(
                    Task.DIAGNOSIS,
                    "single choice",
                    choice.question,
                    (choice.answer,),
                    choice.candidates,
                    tuple(named),
                    choice.candidates.index(choice.answer),
                ),
                Question(Task.REPORT, "report", wanted, report_phrasings(frame.truth, language)),
            ),
            region=frame.truth.region,
            quality=frame.truth.quality,
        )


def contrast(image: npt.NDArray[np.uint8]) -> float:
    """The standard deviation of a picture's grey values, 0 to 127.5."""
    return float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).std())


def sharpness(image: npt.NDArray[np.uint8]) -> float:
    """The variance of the Laplacian of the grey picture, its longer side brought to 256 pixels.

    Source: J. L. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = SHARPNESS_PX / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return float(cv2.Laplacian(small, cv2.CV_64F).var())
