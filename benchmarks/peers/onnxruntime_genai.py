"""onnxruntime-genai on a dense Qwen2 with random INT8 weights."""

from __future__ import annotations

import time
from importlib.metadata import version

import numpy as np

from benchmarks.command_line import run
from benchmarks.environments import FOLDER, Peer
from benchmarks.shape import DenseShape
from benchmarks.worker import Facts, LanguageModel, prompt_ids

PEER = Peer(
    title="onnxruntime-genai INT8",
    module="benchmarks.peers.onnxruntime_genai",
    packages=("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2"),
)


class OnnxRuntimeGenai(LanguageModel):
    """The library's generator, greedy."""

    def __init__(self, shape: DenseShape, threads: int) -> None:
        import onnxruntime_genai  # type: ignore[import-not-found]  # only the peer's environment has it

        from benchmarks.peers.genai_folder import CONFIG, CONTEXT, DATA, write_folder

        sizes = (shape.vocab, shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.kv_heads, threads)
        folder = FOLDER / "models" / f"genai-{'-'.join(map(str, sizes))}"
        if not (folder / CONFIG).is_file():  # written last
            write_folder(shape, folder, threads)
        self._vocab = shape.vocab
        model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=CONTEXT)
        self._generator = onnxruntime_genai.Generator(model, parameters)
        self.facts = Facts(f"onnxruntime-genai {version('onnxruntime-genai')}", (folder / DATA).stat().st_size)

    def decode(self, prompt: int, tokens: int) -> float:
        """Time `tokens` greedy steps after `prompt` tokens."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(np.array(prompt_ids(prompt, self._vocab), np.int32))
        # The first call takes the prompt's own likeliest token and computes nothing; the second warms up.
        for _ in range(2):
            self._generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(tokens):
            self._generator.generate_next_token()
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Time one pass over `tokens` tokens."""
        self._generator.rewind_to(0)
        ids = np.array(prompt_ids(tokens, self._vocab), np.int32)
        began = time.perf_counter()
        self._generator.append_tokens(ids)
        return time.perf_counter() - began


if __name__ == "__main__":
    run(PEER, DenseShape, OnnxRuntimeGenai)
