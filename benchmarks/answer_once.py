"""Opens a bundle, answers one question about a phantom frame, and ends with a JSON line of how long it took.

python -m benchmarks.answer_once BUNDLE
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import msgspec

from sonoedge.calibration.phantom import phantom
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Generation
from sonoedge.runtime.look import Prompter, look_at
from sonoedge.runtime.model import open_model

QUESTION = "Is a lesion visible?"
FRAME_SEED = 9_000_000
FRAME_PX = 448  # so that the image fills the 196 tokens that EchoVLM allows one
MOST_TOKENS = 32


class Answered(msgspec.Struct, frozen=True):
    """One answer; the first token takes the vision tower and the prefill, the rest are decoded one by one."""

    answer: str
    tokens: int
    prompt_tokens: int
    open_s: float  # every hash checked, recorded outputs repeated
    first_token_s: float
    decode_tokens_s: float | None  # None when the model ended its answer at once


def answer_once(bundle: Path) -> Answered:
    """Ask the bundle one question about a phantom frame; raises SonoEdgeError when it cannot be opened."""
    began = time.monotonic()
    model = open_model(bundle)
    opened = time.monotonic()
    with contextlib.closing(model.session) as session:
        frame = Frame(phantom(FRAME_SEED, size=FRAME_PX).image, 0, time.monotonic_ns(), None, "phantom")
        look = look_at(session, frame)
        prompt = Prompter(session, model.tokenizer).question([look], QUESTION, "en")
        generation = Generation(session, model.tokenizer, prompt, max_tokens=MOST_TOKENS)
        text = generation.step()
        first = time.monotonic()
        while generation.finish is None:
            text += generation.step()
        ended = time.monotonic()
    decoded = len(generation.ids) - 1
    return Answered(
        answer=text,
        tokens=len(generation.ids),
        prompt_tokens=len(prompt.ids),
        open_s=round(opened - began, 2),
        first_token_s=round(first - opened, 2),
        decode_tokens_s=round(decoded / (ended - first), 2) if decoded > 0 else None,
    )


if __name__ == "__main__":
    print(msgspec.json.encode(answer_once(Path(sys.argv[1]))).decode())
