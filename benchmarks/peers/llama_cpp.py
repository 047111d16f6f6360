"""llama.cpp on a dense Qwen2 with random Q8_0 weights, built from source for this processor."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.command_line import run
from benchmarks.environments import FOLDER, Peer
from benchmarks.shape import DenseShape
from benchmarks.worker import Facts, LanguageModel, prompt_ids

PEER = Peer(
    title="llama.cpp Q8_0",
    module="benchmarks.peers.llama_cpp",
    packages=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    tools=("cc", "c++", "cmake"),
    # The instructions of this processor, and nothing that needs a GPU, pictures or the network.
    build_settings={
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        "PIP_NO_BINARY": "llama-cpp-python",
    },
)
CONTEXT = 512


class LlamaCpp(LanguageModel):
    """The C interface of llama.cpp, one token or one prompt a call."""

    def __init__(self, shape: DenseShape, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]  # only the peer's environment has it

        from benchmarks.peers.gguf_file import write_gguf

        path = FOLDER / "models" / f"qwen2-{'-'.join(map(str, (shape.vocab, shape.hidden, shape.intermediate)))}.gguf"
        path = path.with_stem(f"{path.stem}-{shape.layers}-{shape.heads}-{shape.kv_heads}")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            write_gguf(shape, partial)
            partial.rename(path)
        self._lib: Any = llama_cpp
        self._vocab = shape.vocab
        # Kept by name: the library frees what Python forgets.
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._context = self._llama.ctx
        self.facts = Facts(f"llama-cpp-python {version('llama-cpp-python')}", path.stat().st_size)

    def decode(self, prompt: int, tokens: int) -> float:
        """Time `tokens` greedy steps after `prompt` tokens."""
        self._clear()
        token = self._run(prompt_ids(prompt, self._vocab))
        token = self._run([token])
        began = time.perf_counter()
        for _ in range(tokens):
            token = self._run([token])
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Time one pass over `tokens` tokens."""
        self._clear()
        began = time.perf_counter()
        self._run(prompt_ids(tokens, self._vocab))
        return time.perf_counter() - began

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def _run(self, ids: list[int]) -> int:
        """Append tokens and return the likeliest next one."""
        array = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids)))
        assert status == 0, f"llama_decode gave {status}"
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (self._vocab,))
        return int(logits.argmax())


if __name__ == "__main__":
    run(PEER, DenseShape, LlamaCpp)
