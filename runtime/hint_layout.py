"""All questions of a schema, with all their candidate answers, as one tree of tokens behind a shared image prefix."""

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.hints import HintSchema
from sonoedge.runtime.prompt import answer_ids, question_ids
from sonoedge.runtime.tokens import Tokenizer


class HintLayout(msgspec.Struct, frozen=True):
    """The tree: n tokens, r rows whose logits are needed, and p tokens to look up there, c candidates in all."""

    ids: npt.NDArray[np.int64]  # [n]
    offsets: npt.NDArray[np.int64]  # [n], positions counted from the prefix's next position
    visible: npt.NDArray[np.bool_]  # [n, n], among the tree's own tokens
    rows: npt.NDArray[np.int64]  # [r]
    picked_row: npt.NDArray[np.int64]  # [p], index into rows
    picked_token: npt.NDArray[np.int64]  # [p]
    picked_candidate: npt.NDArray[np.int64]  # [p], index over the candidates of all hints
    slices: tuple[slice, ...]  # one a hint, over the c candidates


def lay_out(schema: HintSchema, tokenizer: Tokenizer, language: str) -> HintLayout:
    """Lay out every question of `schema`: a question sees itself, a candidate sees its question and itself.

    A candidate's last token, the end of the turn, is looked up but never fed; raises SonoEdgeError for an unknown
    language.
    """
    tree = _Tree()
    slices: list[slice] = []
    for hint in schema.hints:
        first = tree.candidates
        question = tree.branch(question_ids(tokenizer, hint.question.get(language)), behind=[])
        for candidate in hint.candidates:
            tree.candidate(answer_ids(tokenizer, candidate.text.get(language)), question)
        slices.append(slice(first, tree.candidates))
    return tree.layout(tuple(slices))


class _Tree:
    def __init__(self) -> None:
        self.candidates = 0
        self.ids: list[int] = []
        self.offsets: list[int] = []
        self.ancestors: list[list[int]] = []  # of each token, itself included
        self.rows: dict[int, int] = {}  # tree token → index among the rows
        self.picks: list[tuple[int, int, int]] = []

    def branch(self, ids: list[int], behind: list[int]) -> list[int]:
        """Append tokens that follow the path `behind`; return the path to the last of them."""
        path = list(behind)
        for index in ids:
            path = [*path, len(self.ids)]
            self.offsets.append(len(path) - 1)
            self.ids.append(index)
            self.ancestors.append(path)
        return path

    def candidate(self, ids: list[int], question: list[int]) -> None:
        path = self.branch(ids[:-1], behind=question)
        for token, predictor in zip(ids, path[len(question) - 1 :], strict=True):
            row = self.rows.setdefault(predictor, len(self.rows))
            self.picks.append((row, token, self.candidates))
        self.candidates += 1

    def layout(self, slices: tuple[slice, ...]) -> HintLayout:
        visible = np.zeros((len(self.ids), len(self.ids)), np.bool_)
        for token, path in enumerate(self.ancestors):
            visible[token, path] = True
        picked = np.array(self.picks, np.int64).T
        return HintLayout(
            ids=np.array(self.ids, np.int64),
            offsets=np.array(self.offsets, np.int64),
            visible=visible,
            rows=np.array(list(self.rows), np.int64),
            picked_row=picked[0],
            picked_token=picked[1],
            picked_candidate=picked[2],
            slices=slices,
        )
