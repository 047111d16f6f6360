"""A built bundle on ONNX Runtime, through the session that serves it: SonoEdge itself, INT8 or float by its recipe."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime

from benchmarks.command_line import run
from benchmarks.environments import Peer
from benchmarks.worker import Facts, prompt_ids
from sonoedge.bundle import open_bundle
from sonoedge.runtime.preprocess import Patches
from sonoedge.runtime.sessions.ort import open_session

PEER = Peer(title="SonoEdge", module="benchmarks.peers.bundle")


class Bundle(msgspec.Struct, frozen=True):
    """Where the bundle is."""

    bundle: str


class BundleSession:
    """The runtime's session, one token, one prompt or one image a call."""

    def __init__(self, options: Bundle, threads: int) -> None:
        bundle = open_bundle(Path(options.bundle))
        self._session = open_session(bundle, threads=threads)
        self._vocab = self._session.spec.vocab
        size = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith("graphs/"))
        self.facts = Facts(f"onnxruntime {onnxruntime.__version__}", size)

    def decode(self, prompt: int, tokens: int) -> float:
        """Time `tokens` greedy steps after `prompt` tokens."""
        self._session.rewind(0)
        token = self._run(self._ids(prompt))
        token = self._run([token])
        began = time.perf_counter()
        for _ in range(tokens):
            token = self._run([token])
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Time one pass over `tokens` tokens."""
        self._session.rewind(0)
        ids = self._ids(tokens)
        began = time.perf_counter()
        self._run(ids)
        return time.perf_counter() - began

    def vision(self) -> float:
        """Time one image of the largest square size."""
        patches = largest_image(self._session.image.max_pixels, self._session.image.patch_size)
        began = time.perf_counter()
        self._session.encode_image(patches)
        return time.perf_counter() - began

    def _ids(self, tokens: int) -> list[int]:
        ids = prompt_ids(tokens, self._vocab)
        assert self._session.spec.image_token_id not in ids  # there is no image behind it
        return ids

    def _run(self, ids: list[int]) -> int:
        """Append tokens and return the likeliest next one."""
        length = self._session.length
        positions = np.tile(np.arange(length, length + len(ids)), (3, 1))  # [3, n]
        logits = self._session.extend(np.array(ids), positions)
        # An image token in an answer would ask for an image: the half that prompts come from holds none.
        return int(logits[0, : self._vocab // 2].argmax())


def largest_image(max_pixels: int, patch_size: int) -> Patches:
    """Random patches of the largest square image of whole merge blocks."""
    side = int((max_pixels**0.5) // (2 * patch_size)) * 2
    rng = np.random.default_rng(0)
    values = rng.standard_normal((side * side, 3 * 2 * patch_size**2), np.float32)
    return Patches(values, (1, side, side))


if __name__ == "__main__":
    run(PEER, Bundle, BundleSession)
