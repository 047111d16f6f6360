"""ONNX Runtime on the CPU: the vision graph and the decoder graph, the KV cache written in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import Bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.base import DecoderSpec
from sonoedge.runtime.sessions.checks import check_extend, check_rewind
from sonoedge.runtime.sessions.masks import attention_bias, causal

if TYPE_CHECKING:
    import onnxruntime

SMALL_WEIGHTS_BYTES = 4 * 2**20  # a stage smaller than this stays in a core's caches
HELD_WEIGHTS_BYTES = 256 * 2**20  # a larger file is mapped: sessions with copies of it would not fit a small machine
CPU = "CPUExecutionProvider"


def open_session(bundle: Bundle, *, threads: int | None = None) -> OrtSession:
    """Load the ONNX Runtime graphs of a bundle; raises SonoEdgeError when onnxruntime is missing or refuses a graph."""
    return OrtSession(
        bundle.graph("vision", "ort"),
        bundle.graph("decoder", "ort"),
        bundle.manifest.image,
        bundle.manifest.decoder,
        decode=bundle.find_graph("decode", "ort"),
        threads=threads or _threads(bundle),
    )


def _threads(bundle: Bundle) -> int:
    """Every core for a model whose weights must come from memory; one where waking a second costs more than it does."""
    known = [cost.bytes for cost in bundle.manifest.stages.values() if cost.bytes is not None]
    small = bool(known) and max(known) < SMALL_WEIGHTS_BYTES
    return 1 if small else len(os.sched_getaffinity(0))


class OrtSession:
    """A `Session` on ONNX Runtime's CPU provider."""

    def __init__(
        self,
        vision: Path,
        decoder: Path,
        image: ImageSpec,
        spec: DecoderSpec,
        *,
        threads: int,
        decode: Path | None = None,
    ) -> None:
        """Load the graphs; `decode` is the decoder laid out for one token, `threads` serve what a call computes."""
        self.image, self.spec = image, spec
        self.length = 0
        self._vision = load_graph(vision, threads)
        self._decoder = _Decoder(decoder, threads)
        self._decode = self._decoder if decode is None else _Decoder(decode, threads)
        shape = (1, spec.kv_heads, spec.context, spec.head_dim)
        names = [f"{part}_{layer}" for layer in range(spec.layers) for part in ("key", "value")]
        ort_value = import_onnxruntime().OrtValue
        # One buffer is the past and the present of a layer: the operator writes new keys and values behind the old.
        self._cache = {name: ort_value.ortvalue_from_numpy(np.zeros(shape, self._decoder.cache_type)) for name in names}

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture."""
        return run_vision(self._vision, patches, self.image)

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        check_rewind(self.length, length)
        self.length = length

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
        new, total = len(ids), self.length + len(ids)
        visible = causal(new, self.length) if visible is None else visible
        inputs = {
            **token_inputs(self.spec, ids, positions, image_embeds, logits_rows),
            "attention_bias": attention_bias(visible, np.arange(total), (new, total)),
            "last_token": np.array([total - 1], np.int32),
            "total_tokens": np.array(total, np.int32),
        }
        decoder = self._decode if new == 1 else self._decoder
        logits = decoder.run(inputs, self._cache)
        self.length = total
        return logits

    def close(self) -> None:
        """Free the graphs and the cache."""
        del self._vision, self._decoder, self._decode, self._cache


class _Decoder:
    """One decoder graph; graphs of one bundle take turns at one cache."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = load_graph(path, threads)
        self._binding: Any = self._session.io_binding()
        held = {value.name: value.type for value in self._session.get_inputs()}
        self.cache_type = np.int8 if held["past_key_0"] == "tensor(int8)" else np.float32

    def run(self, inputs: Mapping[str, npt.NDArray[Any]], cache: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        """Logits [r, vocab]; the cache's buffers take up the new tokens."""
        binding = self._binding
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}  # alive until the call is over
        bind_anew(binding, held)
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self._session.run_with_iobinding(binding)
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits


def run_vision(vision: onnxruntime.InferenceSession, patches: Patches, image: ImageSpec) -> npt.NDArray[np.float32]:
    """Return the embeddings [merged, hidden] that a vision graph gives of one picture."""
    feed = {"patches": patches.values, "places": patch_places(patches.grid, image.merge_size)}
    embeds: npt.NDArray[np.float32] = vision.run(["image_embeds"], feed)[0]
    return embeds


def token_inputs(
    spec: DecoderSpec,
    ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    image_embeds: npt.NDArray[np.float32] | None,
    logits_rows: npt.NDArray[np.int64] | None,
) -> dict[str, npt.NDArray[Any]]:
    """Return what every decoder graph takes of `Session.extend`'s arguments; without a picture, a row of zeros."""
    if image_embeds is None or not len(image_embeds):
        image_embeds = np.zeros((1, spec.hidden), np.float32)
    return {
        "input_ids": ids[None],
        "positions": positions[:, None],
        "image_embeds": image_embeds,
        "logits_rows": np.array([len(ids) - 1]) if logits_rows is None else logits_rows,
    }


def bind_anew(binding: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Bind arrays, which must stay alive until the call is over, and the logits, in place of all that was bound."""
    binding.clear_binding_inputs()
    binding.clear_binding_outputs()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")


@functools.lru_cache(maxsize=16)
def patch_places(grid: tuple[int, int, int], merge: int) -> npt.NDArray[np.int64]:
    """Row and column of every patch [t * h * w, 2], merge blocks together, as the patches come."""
    frames, rows, columns = grid
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)  # [rows, columns, 2]
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(-1, 2), (frames, 1)).astype(np.int64)


def import_onnxruntime() -> Any:
    """The module; raises SonoEdgeError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise SonoEdgeError(
            "onnxruntime is not installed: pip install 'sonoedge[cpu]', or 'sonoedge[gpu]' on a host with an NVIDIA GPU"
        ) from error
    return onnxruntime


def load_graph(path: Path, threads: int, provider: str = CPU) -> onnxruntime.InferenceSession:
    """A graph of a bundle on a provider, with the settings that every one of them needs."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Graphs take turns: a pool may spin within its own run only, or it takes the cores from the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without it, x86 processors that lack VNNI add int8 products in saturating 16-bit sums and answer wrongly.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    # ONNX Runtime maps a file of weights: one that is written over while it is served would change the answers, and one
    # that is cut short would end the process. Weights that are read into memory stay the ones that were checked.
    held = [file for file in path.parent.glob("*.weights") if file.stat().st_size <= HELD_WEIGHTS_BYTES]
    contents = [file.read_bytes() for file in held]
    try:
        if held:
            sizes = [len(content) for content in contents]
            options.add_external_initializers_from_files_in_memory([file.name for file in held], contents, sizes)
        return runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's own errors share no base class but Exception
        raise SonoEdgeError(
            f"onnxruntime {runtime.__version__} cannot load {path.name} ({error}): build the bundle again"
        ) from error
