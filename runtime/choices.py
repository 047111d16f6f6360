"""A single choice by scoring: the prompt is run once, then every choice's letter in one pass, as hints are scored."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sonoedge.runtime.look import Prompt
from sonoedge.runtime.prompt import answer_ids
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer


def score_choices(
    session: Session, tokenizer: Tokenizer, prompt: Prompt, answers: Sequence[str], *, held: int = 0
) -> npt.NDArray[np.float64]:
    """Return the probability [answers] of each answer to `prompt` among them; the cache then holds the prompt.

    held: how many of the prompt's tokens, every picture's included, the session's cache begins with already.
    """
    session.rewind(held)
    pictures = None if held else prompt.embeds
    first = session.extend(prompt.ids[held:], prompt.positions[:, held:], image_embeds=pictures)  # [1, vocab]
    length = len(prompt.ids)
    paths = [answer_ids(tokenizer, answer) for answer in answers]
    scores = np.array([_log_softmax(first[-1])[path[0]] for path in paths], np.float64)
    # The last token of a path, the end of the turn, is looked up and never fed.
    fed = np.array([token for path in paths for token in path[:-1]], np.int64)  # [n]
    owner = np.array([index for index, path in enumerate(paths) for _ in path[:-1]])  # [n]
    depth = np.array([depth for path in paths for depth in range(len(path) - 1)])  # [n]
    own = (owner[:, None] == owner[None]) & (depth[:, None] >= depth[None])  # [n, n]
    logits = session.extend(  # [n, vocab]
        fed,
        np.ascontiguousarray(np.broadcast_to(depth + prompt.next_position, (3, len(fed)))),
        visible=np.concatenate([np.ones((len(fed), length), np.bool_), own], axis=1),
        logits_rows=np.arange(len(fed)),
    )
    session.rewind(length)
    for row, (index, level) in enumerate(zip(owner, depth, strict=True)):
        scores[index] += _log_softmax(logits[row])[paths[index][level + 1]]
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum(), np.float64)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)
