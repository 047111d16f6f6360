"""EchoVLM's conversation files: reading them with errors that name the entry, and writing phantoms the same way.

What one may hold: one or several images, one or several turns, with or without a system turn; reports, findings,
impressions, single choices and true-or-false questions are told apart by `sonoedge.calibration.questions`.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

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


class _Entry(msgspec.Struct, frozen=True):
    """One case as a file may write it: a single image need not stand in a list."""

    id: str | int
    image: tuple[str, ...] | str
    conversations: tuple[Turn, ...]
    phantom: Truth | None = None
    region: str | None = None

    def conversation(self, folder: Path) -> Conversation:
        images = (self.image,) if isinstance(self.image, str) else self.image
        paths = tuple(str(folder / image) for image in images)
        return _marked(Conversation(self.id, paths, self.conversations, self.phantom, self.region))


def read_conversations(path: Path | str) -> tuple[Conversation, ...]:
    """Read a conversation file; image paths come back resolved against its folder.

    A file that marks no image at all is read as EchoVLM's own loader reads it: the images stand before the first
    question. Raises SonoEdgeError for a file that is not such a list (naming the entry and the key), for turns out of
    order, for image marks that do not match the images, and for image files that do not exist (listing them).
    Source: the data format of the EchoVLM repository.
    """
    source = Path(path)
    entries = _decoded(source, tuple[_Entry, ...])
    if not entries:
        raise SonoEdgeError(f"conversations {source} hold no entry; give a file with at least one case")
    resolved = []
    missing: list[str] = []
    for index, raw in enumerate(entries):
        entry = raw.conversation(source.parent)
        check_entry(entry, f"{source} entry {index} (id {entry.id!r})")
        missing += [image for image in entry.image if not Path(image).is_file()]
        resolved.append(entry)
    if missing:
        raise SonoEdgeError(
            f"conversations {source} name images that do not exist: {listed_images(missing)}; add or remove them"
        )
    return tuple(resolved)


def each_entry(path: Path | str) -> Iterator[Conversation | str]:
    """Every entry of a conversation file, or, in the place of one that cannot be used, what is wrong with it.

    Missing images are not looked for. Raises SonoEdgeError for a file that is no JSON list, or an empty one.
    """
    source = Path(path)
    raws = _decoded(source, list[msgspec.Raw])
    if not raws:
        raise SonoEdgeError(f"conversations {source} hold no entry; give a file with at least one case")
    for raw in raws:
        try:
            entry = msgspec.json.decode(raw, type=_Entry).conversation(source.parent)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            yield f"{error}; correct that entry"
            continue
        wrong = fault(entry)
        yield entry if wrong is None else f"id {entry.id!r}: {wrong}"


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
    wrong = fault(entry)
    if wrong is not None:
        raise SonoEdgeError(f"conversations {where}: {wrong}")


def fault(entry: Conversation) -> str | None:
    """What is wrong with the turns of an entry or their image marks, and the way out; None where nothing is."""
    roles = [turn.role for turn in entry.conversations]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        order = ", ".join(roles) or "nowhere"
        return f"key 'from' goes {order}; write an optional system turn, then human and gpt in turn"
    marks = _marks(entry)
    if marks != len(entry.image):
        return (
            f"key 'image' lists {len(entry.image)} images but the turns hold {marks} {IMAGE_MARK} marks; write one "
            "mark for each image"
        )
    return None


def _marks(entry: Conversation) -> int:
    return sum(turn.value.count(IMAGE_MARK) for turn in entry.conversations if turn.role == "human")


def _marked(entry: Conversation) -> Conversation:
    """The entry with its images marked before the first question, where it marks none."""
    first = next((index for index, turn in enumerate(entry.conversations) if turn.role == "human"), None)
    if first is None or not entry.image or _marks(entry):
        return entry
    turns = list(entry.conversations)
    turns[first] = msgspec.structs.replace(turns[first], value=IMAGE_MARK * len(entry.image) + turns[first].value)
    return msgspec.structs.replace(entry, conversations=tuple(turns))


T = TypeVar("T")


def _decoded(source: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(source.read_bytes(), type=kind)
    except OSError as error:
        raise SonoEdgeError(
            f"conversations {source} cannot be read ({error.strerror}); give the path of a JSON file"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SonoEdgeError(f"conversations {source} are malformed: {error}; correct that entry") from error
