"""One frame as the model sees it, and prompts about one or more of them as the arrays that a session takes."""

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.positions import mrope_positions
from sonoedge.runtime.preprocess import crop_to_sector, preprocess
from sonoedge.runtime.prompt import conversation_ids, prefix_ids
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

KEPT_PREFIXES = 16  # feeds change size rarely
KEPT_LOOKS = 4  # the most pictures of one question


class Look(msgspec.Struct, frozen=True):
    """One frame and its image embeddings."""

    frame: Frame
    embeds: npt.NDArray[np.float32]  # [merged, hidden]
    grid: tuple[int, int, int]  # patches, before merging


class Prompt(msgspec.Struct, frozen=True):
    """Tokens ready for a session that holds nothing before them."""

    ids: npt.NDArray[np.int64]  # [n]
    positions: npt.NDArray[np.int64]  # [3, n]
    next_position: int
    embeds: npt.NDArray[np.float32]  # [merged of every image, hidden]


def look_at(session: Session, frame: Frame) -> Look:
    """Crop, preprocess and encode a frame; raises SonoEdgeError when the picture is too long and thin."""
    patches = preprocess(crop_to_sector(frame), session.image)
    return Look(frame, session.encode_image(patches), patches.grid)


class Looks:
    """Looks of one session that are worth keeping: the newest, and those that were asked about last."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._newest: Look | None = None
        self._asked: deque[Look] = deque(maxlen=KEPT_LOOKS)

    def newest(self, frame: Frame) -> Look:
        """Look at a new frame; raises SonoEdgeError when the picture is too long and thin."""
        self._newest = look_at(self._session, frame)
        return self._newest

    def asked(self, frame: Frame) -> Look:
        """Return the look at a frame that is asked about; raises as `newest` does."""
        for look in self._asked:
            if look.frame is frame:
                return look
        same = self._newest is not None and self._newest.frame is frame
        look = self._newest if same and self._newest is not None else look_at(self._session, frame)
        self._asked.append(look)
        return look


class Prompter:
    """Builds prompts for one session; the text around images of the same size is tokenized once."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._prefixes: dict[tuple[tuple[tuple[int, int, int], ...], str], Prompt] = {}

    def prefix(self, looks: Sequence[Look], language: str) -> Prompt:
        """Return the prompt up to the last image; raises SonoEdgeError for an unknown language."""
        grids = tuple(look.grid for look in looks)
        prompt = self._prefixes.get((grids, language))
        if prompt is None:
            merge_size = self._session.image.merge_size
            merged = [t * h * w // merge_size**2 for t, h, w in grids]
            ids = np.array(prefix_ids(self._tokenizer, merged, language), np.int64)
            prompt = Prompt(ids, *self._positions(ids, grids), np.empty((0, self._session.spec.hidden), np.float32))
            if len(self._prefixes) >= KEPT_PREFIXES:
                self._prefixes.clear()
            self._prefixes[(grids, language)] = prompt
        embeds = looks[0].embeds if len(looks) == 1 else np.concatenate([look.embeds for look in looks])
        return Prompt(prompt.ids, prompt.positions, prompt.next_position, embeds)

    def question(
        self, looks: Sequence[Look], question: str, language: str, turns: Sequence[tuple[str, str]] = ()
    ) -> Prompt:
        """Return the prompt for a question after earlier `turns` of question and answer.

        Raises SonoEdgeError when it does not fit the model's context.
        """
        prefix = self.prefix(looks, language)
        ids = np.array(conversation_ids(self._tokenizer, turns, question), np.int64)
        length, context = len(prefix.ids) + len(ids), self._session.spec.context
        if length >= context:
            raise SonoEdgeError(
                f"the question with its picture is {length} tokens long and the context holds {context}: "
                "ask a shorter question" + (" or leave earlier turns out" if turns else "")
            )
        positions = np.broadcast_to(np.arange(len(ids)) + prefix.next_position, (3, len(ids)))
        return Prompt(
            np.concatenate([prefix.ids, ids]),
            np.concatenate([prefix.positions, positions], axis=1),
            prefix.next_position + len(ids),
            prefix.embeds,
        )

    def _positions(
        self, ids: npt.NDArray[np.int64], grids: Sequence[tuple[int, int, int]]
    ) -> tuple[npt.NDArray[np.int64], int]:
        return mrope_positions(
            ids,
            grids,
            image_token_id=self._session.spec.image_token_id,
            merge_size=self._session.image.merge_size,
        )
