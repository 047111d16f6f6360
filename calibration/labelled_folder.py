"""A folder of folders of pictures, each named as its class: every picture becomes a single choice among the classes."""

from __future__ import annotations

from pathlib import Path

from sonoedge.calibration.conversations import IMAGE_MARK, Conversation, Turn, read_conversations
from sonoedge.calibration.frames import PICTURES, is_dicom, natural_order, visible_files
from sonoedge.calibration.phantom.truth import REGIONS
from sonoedge.calibration.phantom_wording import DIAGNOSIS, OWN_QUESTIONS
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.prompt import LETTERS, single_choice

FEWEST_CLASSES = 2


def is_labelled(path: Path) -> bool:
    """Whether `path` is a folder with at least two folders of pictures or DICOM files, and none beside them."""
    return path.is_dir() and not _own_pictures(path) and len(_classes(path)) >= FEWEST_CLASSES


def read_labelled(path: Path) -> tuple[Conversation, ...]:
    """One case a picture, asked what it shows, the classes being the choices; the region where the path names it.

    A DICOM clip is one picture. Raises SonoEdgeError when the folder is no such one, or has more classes than letters.
    """
    if not is_labelled(path):
        raise SonoEdgeError(
            f"{path} holds no labelled pictures: make a folder for each class, with its pictures or DICOM files inside"
        )
    classes = _classes(path)
    if len(classes) > len(LETTERS):
        raise SonoEdgeError(
            f"{path} has {len(classes)} classes and a single choice has at most {len(LETTERS)}: group the classes"
        )
    question = IMAGE_MARK + single_choice(OWN_QUESTIONS[DIAGNOSIS]["en"], list(classes))
    return tuple(
        Conversation(
            id=str(file.relative_to(path)),
            image=(str(file),),
            conversations=(Turn("human", question), Turn("gpt", letter)),
            region=next((part for part in (path.name, name) if part in REGIONS), None),
        )
        for letter, (name, files) in zip(LETTERS, classes.items(), strict=False)
        for file in files
    )


def read_answered(path: Path) -> tuple[Conversation, ...]:
    """The cases of a conversation file or of a labelled folder; raises SonoEdgeError as their readers do."""
    return read_labelled(path) if path.is_dir() else read_conversations(path)


def _classes(path: Path) -> dict[str, list[Path]]:
    """The files of every class, folders without any left out."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {folder.name: [file for file in visible_files(folder) if _is_picture(file)] for folder in folders}
    return {name: sorted(files, key=natural_order) for name, files in found.items() if files}


def _own_pictures(path: Path) -> bool:
    return any(entry.is_file() and not entry.name.startswith(".") and _is_picture(entry) for entry in path.iterdir())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES or is_dicom(path)
