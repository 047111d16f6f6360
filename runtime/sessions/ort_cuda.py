"""ONNX Runtime on an NVIDIA GPU without TensorRT: the portable graphs, the KV cache on the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import Bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.base import DecoderSpec
from sonoedge.runtime.sessions.checks import check_extend, check_rewind
from sonoedge.runtime.sessions.masks import attention_bias, causal
from sonoedge.runtime.sessions.ort import CPU, bind_anew, import_onnxruntime, load_graph, run_vision, token_inputs

CUDA = "CUDAExecutionProvider"
Place = Literal["cuda", "cpu"]
_PROVIDERS: dict[Place, str] = {"cuda": CUDA, "cpu": CPU}


def open_session(bundle: Bundle) -> OrtCudaSession:
    """Load the portable graphs on the GPU; raises SonoEdgeError when ONNX Runtime cannot give it."""
    return OrtCudaSession(
        bundle.graph("vision", "qdq"),
        bundle.graph("decoder", "qdq"),
        bundle.manifest.image,
        bundle.manifest.decoder,
        place="cuda",
    )


class OrtCudaSession:
    """A `Session` on the portable graphs, whose KV cache comes out of every call grown by the new tokens.

    A rewind only forgets where tokens are: the cache keeps their columns, masked, until it is as long as the context.
    """

    def __init__(self, vision: Path, decoder: Path, image: ImageSpec, spec: DecoderSpec, *, place: Place) -> None:
        """Load the graphs at `place`; raises SonoEdgeError when ONNX Runtime runs them elsewhere."""
        self.image, self.spec = image, spec
        self._place = place
        self._vision = _load(vision, _PROVIDERS[place])
        self._decoder = _load(decoder, _PROVIDERS[place])
        self._binding: Any = self._decoder.io_binding()
        self._ort_value = import_onnxruntime().OrtValue
        held = {value.name: value.type for value in self._decoder.get_inputs()}
        dtype = np.int8 if held["past_key_0"] == "tensor(int8)" else np.float32
        self._empty = np.zeros((1, spec.kv_heads, 0, spec.head_dim), dtype)
        self._names = [f"{part}_{layer}" for layer in range(spec.layers) for part in ("key", "value")]
        self._columns = np.zeros(0, np.int64)  # of each cached token
        self._width = 0  # columns of the cache, those of forgotten tokens included
        self._cache: dict[str, Any] = {}
        self._forget_all()

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return len(self._columns)

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture."""
        return run_vision(self._vision, patches, self.image)

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        check_rewind(self.length, length)
        if length == 0:
            self._forget_all()
        else:
            self._columns = self._columns[:length]

    def extend(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        *,
        image_embeds: npt.NDArray[np.float32] | None = None,
        visible: npt.NDArray[np.bool_] | None = None,
        logits_rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the cache and return logits [r, vocab]; see `Session.extend`."""
        check_extend(self.spec, self.length, ids, image_embeds)
        new = len(ids)
        if self._width + new > self.spec.context:
            self._compact()
        visible = causal(new, self.length) if visible is None else visible
        columns = np.concatenate([self._columns, self._width + np.arange(new)])
        width = self._width + new
        inputs = {
            **token_inputs(self.spec, ids, positions, image_embeds, logits_rows),
            "attention_bias": attention_bias(visible, columns, (new, width)),
        }
        logits = self._run(inputs)
        self._columns, self._width = columns, width
        return logits

    def close(self) -> None:
        """Free the graphs and the cache."""
        del self._vision, self._decoder, self._binding, self._cache

    def _run(self, inputs: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Logits [r, vocab]; the grown cache takes the place of the old."""
        binding = self._binding
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}  # alive until the call is over
        bind_anew(binding, held)
        for name in self._names:
            binding.bind_ortvalue_input(f"past_{name}", self._cache[name])
            binding.bind_output(f"present_{name}", self._place)
        self._decoder.run_with_iobinding(binding)
        answer, *grown = binding.get_outputs()
        self._cache = dict(zip(self._names, grown, strict=True))
        logits: npt.NDArray[np.float32] = answer.numpy()
        return logits

    def _forget_all(self) -> None:
        self._columns, self._width = self._columns[:0], 0
        self._cache = dict.fromkeys(self._names, self._on_device(self._empty))

    def _compact(self) -> None:
        """Drop the columns of forgotten tokens, over the host: ONNX Runtime's values cannot be cut on the device."""
        self._cache = {
            name: self._on_device(np.ascontiguousarray(value.numpy()[:, :, self._columns]))
            for name, value in self._cache.items()
        }
        self._width = self.length
        self._columns = np.arange(self.length)

    def _on_device(self, array: npt.NDArray[Any]) -> Any:
        return self._ort_value.ortvalue_from_numpy(array, self._place, 0)


def _load(path: Path, provider: str) -> Any:
    """A graph on a provider; raises SonoEdgeError when ONNX Runtime lacks it or falls back to another."""
    runtime = import_onnxruntime()
    if provider not in runtime.get_available_providers():
        raise SonoEdgeError(
            f"onnxruntime {runtime.__version__} has no {provider}: pip uninstall onnxruntime, then pip install "
            "'sonoedge[gpu]', or serve with `--backend cpu`"
        )
    session = load_graph(path, len(os.sched_getaffinity(0)), provider)
    obtained = session.get_providers()
    if provider not in obtained:
        raise SonoEdgeError(
            f"onnxruntime {runtime.__version__} was asked for {provider} and gave {', '.join(obtained)}: it needs an "
            "NVIDIA GPU with its driver, CUDA and cuDNN as its release notes name them (`sonoedge doctor` says what is "
            "here); `--backend cpu` serves without"
        )
    return session
