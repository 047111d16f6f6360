"""Conversations of a JSON Lines file, one case a line, read when asked for: a corpus of any size takes no memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import msgspec
import numpy as np

from sonoedge.calibration.conversations import Conversation, Entry, check_entry, listed_images
from sonoedge.errors import SonoEdgeError


class ConversationLines(Sequence[Conversation]):
    """The cases of a file; 8 bytes a line are kept, where it begins. Image paths come resolved against its folder."""

    def __init__(self, path: Path | str) -> None:
        """Look at every line once; raises as `read_conversations` does, naming the line."""
        self._path = Path(path)
        begins, missing, begin = [], [], 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        begins.append(begin)
                        case = self._decoded(line, f"line {number}")
                        missing += [image for image in case.image if not Path(image).is_file()]
                    begin += len(line)
        except OSError as error:
            raise SonoEdgeError(
                f"conversations {path} cannot be read ({error.strerror}); give the path of a JSON Lines file"
            ) from error
        if not begins:
            raise SonoEdgeError(f"conversations {path} hold no entry; give a file with at least one case")
        if missing:
            raise SonoEdgeError(
                f"conversations {path} name images that do not exist: {listed_images(missing)}; add or remove them"
            )
        self._begins = np.array(begins, np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self._path.open("rb") as file:
            file.seek(int(self._begins[index]))
            return self._decoded(file.readline(), f"case {index}")

    def _decoded(self, line: bytes, where: str) -> Conversation:
        try:
            case = msgspec.json.decode(line, type=Entry).conversation(self._path.parent)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SonoEdgeError(f"conversations {self._path} {where} is malformed: {error}; correct it") from error
        check_entry(case, f"{self._path} {where} (id {case.id!r})")
        return case
