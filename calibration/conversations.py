"""EchoVLM's conversation files: reading them with errors that name the entry, and writing phantoms the same way."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np

from sonoedge.calibration.phantom import Phantom, Truth, phantom
from sonoedge.calibration.phantom_text import closed_questions, diagnosis, report
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.prompt import SYSTEM

IMAGE_MARK = "<image>"
FILE_NAME = "conversations.json"


class Turn(msgspec.Struct, frozen=True):
    """One turn, as EchoVLM's training files write it."""

    role: Literal["system", "human", "gpt"] = msgspec.field(name="from")
    value: str


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One case: its images and the turns about them. Keys other than these are passed over."""

    id: str | int
    image: tuple[str, ...]  # paths; as read they are resolved against the file's folder
    conversations: tuple[Turn, ...]
    phantom: Truth | None = None  # the truth, where the case is a phantom
    region: str | None = None  # what the images show, where the file says it; a phantom's truth says it too

    @property
    def shown(self) -> str | None:
        """The region that the images show, None where it is not known."""
        return self.phantom.region if self.region is None and self.phantom is not None else self.region

    @property
    def system(self) -> str | None:
        """The system turn's text, where there is one."""
        first = self.conversations[0]
        return first.value if first.role == "system" else None

    @property
    def exchanges(self) -> tuple[tuple[str, str], ...]:
        """Question and answer pairs, image marks included."""
        turns = [turn for turn in self.conversations if turn.role != "system"]
        return tuple((a.value, b.value) for a, b in zip(turns[::2], turns[1::2], strict=True))


def read_conversations(path: Path | str) -> tuple[Conversation, ...]:
    """Read a conversation file; image paths come back resolved against its folder.

    Raises SonoEdgeError for a file that is not such a list (naming the entry and the key), for turns out of order,
    for image marks that do not match the images, and for image files that do not exist (listing them).
    Source: the data format of the EchoVLM repository.
    """
    source = Path(path)
    try:
        entries = msgspec.json.decode(source.read_bytes(), type=tuple[Conversation, ...])
    except OSError as error:
        raise SonoEdgeError(
            f"conversations {source} cannot be read ({error.strerror}); give the path of a JSON file"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"conversations {source} are malformed: {error}; correct that entry") from error
    if not entries:
        raise SonoEdgeError(f"conversations {source} hold no entry; give a file with at least one case")
    resolved = []
    missing: list[str] = []
    for index, entry in enumerate(entries):
        check_entry(entry, f"{source} entry {index} (id {entry.id!r})")
        images = tuple(str(source.parent / image) for image in entry.image)
        missing += [image for image in images if not Path(image).is_file()]
        resolved.append(msgspec.structs.replace(entry, image=images))
    if missing:
        raise SonoEdgeError(
            f"conversations {source} name images that do not exist: {listed_images(missing)}; add or remove them"
        )
    return tuple(resolved)


def write_phantom_conversations(
    folder: Path | str, seeds: Iterable[int], languages: Sequence[str], *, size: int = 224
) -> Path:
    """Write phantoms as PNG frames and one conversation file into a new folder, complete or not at all.

    One case for each seed and language: the closed questions, a single choice and a report; returns the file's path.
    `size` in pixels. Raises SonoEdgeError when the folder already exists or cannot be written, and as `phantom` does.
    """
    target = Path(folder)
    if target.exists():
        raise SonoEdgeError(f"phantom folder {target} already exists; give a new folder or remove it")
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        (partial / "images").mkdir(parents=True)
        entries = []
        for seed in seeds:
            made = phantom(seed, size=size)
            name = f"images/phantom_{seed:08d}.png"
            written, data = cv2.imencode(".png", made.image[:, :, 0])
            if not written:
                raise SonoEdgeError(f"phantom {seed} could not be encoded as PNG; reinstall opencv-python-headless")
            (partial / name).write_bytes(data.tobytes())
            entries += [_conversation(made, name, language) for language in languages]
        encoded = msgspec.json.format(msgspec.json.encode(entries), indent=1)
        (partial / FILE_NAME).write_bytes(encoded)
        partial.rename(target)
    except OSError as error:
        raise SonoEdgeError(
            f"phantom folder {target} cannot be written ({error.strerror}); choose a writable place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / FILE_NAME


def _conversation(made: Phantom, image: str, language: str) -> Conversation:
    truth = made.truth
    rng = np.random.default_rng([truth.seed, len(language), ord(language[0])])
    pairs = [(q.question, q.answer) for q in closed_questions(truth, language, rng)]
    choice = diagnosis(truth, language, rng)
    pairs += [(choice.question, choice.answer), report(truth, language, rng)]
    turns = [Turn(role="system", value=SYSTEM[language])]
    for index, (question, answer) in enumerate(pairs):
        mark = IMAGE_MARK if index == 0 else ""
        turns += [Turn(role="human", value=mark + question), Turn(role="gpt", value=answer)]
    return Conversation(
        id=f"phantom-{truth.seed}-{language}", image=(image,), conversations=tuple(turns), phantom=truth
    )


def listed_images(paths: Sequence[str]) -> str:
    """The first of some paths, and how many more there are."""
    names = list(dict.fromkeys(paths))
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}"


def check_entry(entry: Conversation, where: str) -> None:
    """Raise SonoEdgeError, naming the entry as `where`, for turns out of order and marks that match no images."""
    roles = [turn.role for turn in entry.conversations]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        raise SonoEdgeError(
            f"conversations {where}: key 'from' goes {', '.join(roles) or 'nowhere'}; write an optional system turn, "
            "then human and gpt in turn"
        )
    marks = sum(turn.value.count(IMAGE_MARK) for turn in entry.conversations if turn.role == "human")
    if marks != len(entry.image):
        raise SonoEdgeError(
            f"conversations {where}: key 'image' lists {len(entry.image)} images but the turns hold {marks} "
            f"{IMAGE_MARK} marks; write one mark for each image"
        )
