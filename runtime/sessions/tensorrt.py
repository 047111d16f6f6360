"""TensorRT on a GPU: the engines that `sonoedge engine` made, the KV cache on the device, decode as a CUDA graph."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import Bundle
from sonoedge.engine_manifest import GET_BUILDER, Bucket, Builder, EngineSet, engines_folder
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.base import DecoderSpec
from sonoedge.runtime.sessions.bucketing import Chunk, LogitsRun, logits_runs, padded, plan_chunks
from sonoedge.runtime.sessions.checks import check_extend, check_rewind, check_rows
from sonoedge.runtime.sessions.device import Cudart, Device
from sonoedge.runtime.sessions.engine_check import check_set, choose_set, read_sets
from sonoedge.runtime.sessions.engine_step import EngineStep, PlanFile, TensorRt
from sonoedge.runtime.sessions.gpu import find_gpu, free_bytes, load_cudart
from sonoedge.runtime.sessions.kv_cache import KvCache, cache_bytes
from sonoedge.runtime.sessions.masks import attention_bias, causal
from sonoedge.runtime.sessions.ort import patch_places


def open_session(bundle: Bundle) -> TensorRtSession:
    """Check and load the engines that a bundle has for this GPU.

    Raises SonoEdgeError for a bundle without engines, a machine without GPU, cuda-python or TensorRT, engines made for
    another model, GPU, driver or TensorRT, a changed plan file, and too little memory: all before anything is loaded.
    """
    sets = read_sets(bundle)
    cudart = load_cudart()
    gpu = find_gpu(cudart)
    profile = choose_set(bundle, sets, gpu)
    engines = sets[profile]
    trt = load_tensorrt(engines.builder)
    check_set(bundle, profile, engines, gpu, trt.__version__)
    check_memory(engines, bundle.manifest.decoder, free_bytes(cudart, gpu))
    folder = engines_folder(bundle.root, profile)
    return TensorRtSession(folder, engines, bundle.manifest.image, bundle.manifest.decoder, trt, cudart)


def load_tensorrt(builder: Builder) -> TensorRt:
    """Import the library that made a set of engines; raises SonoEdgeError when it is not installed."""
    try:
        module: Any = importlib.import_module(builder)
    except (ImportError, OSError) as error:  # OSError: its own libraries are missing
        raise SonoEdgeError(
            f"{builder} cannot be imported ({error}), which the engines need: {GET_BUILDER[builder]}"
        ) from error
    loaded: TensorRt = module
    return loaded


def check_memory(engines: EngineSet, spec: DecoderSpec, free: int) -> None:
    """Raise SonoEdgeError when plans, workspace and KV cache need more than the `free` bytes."""
    plans = sum(engine.bytes for engine in engines.engines)
    workspace = max(engine.workspace_bytes or 0 for engine in engines.engines)
    in_place = all(engine.cache_in_place for engine in engines.engines if engine.stage != "vision")
    cache = cache_bytes(spec, np.float16 if in_place else np.float32, in_place=in_place)
    if (needed := plans + workspace + cache) > free:
        raise SonoEdgeError(
            f"the engines need {needed / 1e9:.2f} GB of GPU memory ({plans / 1e9:.2f} plans, {workspace / 1e9:.2f} "
            f"workspace, {cache / 1e9:.2f} KV cache) and {free / 1e9:.2f} GB are free: end other programs, or build "
            "the bundle with a smaller student or context"
        )


class _Place(msgspec.Struct, frozen=True):
    """A bucket and the engine's profile that runs it."""

    bucket: Bucket
    step: EngineStep


class TensorRtSession:
    """A `Session` on the engines of one device profile."""

    def __init__(
        self, folder: Path, engines: EngineSet, image: ImageSpec, spec: DecoderSpec, trt: TensorRt, cudart: Cudart
    ) -> None:
        """Load the plans of `folder`, which have been checked, and allocate the cache."""
        self.image, self.spec, self.engines = image, spec, engines
        self.length = 0
        self._device = Device(cudart)
        try:
            self._load(folder, trt)
        except BaseException:
            self.close()
            raise

    def _load(self, folder: Path, trt: TensorRt) -> None:
        plans = [(engine, PlanFile(trt, self.engines.builder, folder / engine.path)) for engine in self.engines.engines]
        size = max(plan.scratch_bytes for _, plan in plans)
        # Runs follow each other in one stream, so all of them work in the same scratch memory.
        scratch = (self._device.allocate(size), size)
        decoders = [(engine, plan) for engine, plan in plans if engine.stage != "vision"]
        buckets = [bucket for engine, _ in decoders for bucket in engine.buckets]
        self._bias_type, cache_type = (decoders[0][1].tensors[name].dtype for name in ("attention_bias", "past_key_0"))
        self._in_place = all(engine.cache_in_place for engine, _ in decoders)
        tokens = decoders[0][1].largest_shape("past_key_0", 0)[2]
        self._cache = KvCache(self._device, self.spec, tokens, buckets, cache_type, in_place=self._in_place)
        self._fewest = min((bucket.rows for bucket in buckets), default=1)  # one token, padded where that is faster
        self._vision: list[_Place] = []
        self._places: list[_Place] = []
        for engine, plan in plans:
            if plan.engine.num_optimization_profiles != len(engine.buckets):
                raise SonoEdgeError(
                    f"{plan.name} has {plan.engine.num_optimization_profiles} optimization profiles and "
                    f"{len(engine.buckets)} buckets: run `sonoedge engine` on this bundle again"
                )
            for number, bucket in enumerate(engine.buckets):
                if engine.stage == "vision":
                    step = EngineStep(plan, number, self._device, scratch, output="image_embeds", bound={})
                    self._vision.append(_Place(bucket, step))
                else:
                    self._check_shapes(plan, number, bucket)
                    step = EngineStep(
                        plan,
                        number,
                        self._device,
                        scratch,
                        output="logits",
                        bound=self._cache.bound(),
                        captured=bucket.rows == self._fewest,
                    )
                    self._places.append(_Place(bucket, step))
        self._check_reach()

    def _check_shapes(self, plan: PlanFile, profile: int, bucket: Bucket) -> None:
        """Refuse an engine whose sizes are not those of its bucket and the cache: it would write where it must not."""
        wanted = {
            "input_ids": (1, bucket.rows),
            "image_embeds": (bucket.images, self.spec.hidden),
            "attention_bias": (1, 1, bucket.rows, bucket.seen),
            "logits_rows": (bucket.logits,),
            **{name: self._cache.shape for name in self._cache.bound() if name.startswith("past_")},
        }
        for name, shape in wanted.items():
            if name not in plan.tensors or (found := plan.largest_shape(name, profile)) != shape:
                has = list(found) if name in plan.tensors else "missing"
                raise SonoEdgeError(
                    f"{plan.name}: {name} of optimization profile {profile} is {has}, not {list(shape)}: run "
                    "`sonoedge engine` on this bundle again"
                )

    def _check_reach(self) -> None:
        """Refuse engines that would fail in the middle of a conversation."""
        buckets = [place.bucket for place in self._places]
        # The smallest pass reaches furthest into a cache that has no room for padding.
        reach = max((bucket.seen for bucket in buckets if bucket.rows == self._fewest), default=0)
        reach = min(reach, self._cache.tokens - (self._fewest - 1 if self._in_place else 0))
        if reach < self.spec.context:
            raise SonoEdgeError(
                f"the engines hold {reach} tokens and the bundle promises a context of {self.spec.context}: run "
                "`sonoedge engine` on this bundle again"
            )
        for bucket in buckets:
            if bucket.images < bucket.rows or bucket.logits < 1:
                raise SonoEdgeError(
                    f"an engine for {bucket.rows} tokens takes {bucket.images} rows of pictures and gives "
                    f"{bucket.logits} of logits: run `sonoedge engine` on this bundle again"
                )

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture."""
        count = len(patches.values)
        fitting = [place for place in self._vision if place.bucket.rows >= count]
        if not fitting:
            largest = max(place.bucket.rows for place in self._vision)
            raise SonoEdgeError(
                f"the picture has {count} patches and the largest vision engine takes {largest}: run `sonoedge engine` "
                "on this bundle again"
            )
        place = min(fitting, key=lambda fit: fit.bucket.rows)
        places = patch_places(patches.grid, self.image.merge_size)
        embeds: npt.NDArray[np.float32] = place.step.run({"patches": patches.values, "places": places})
        return embeds

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
        new = len(ids)
        rows = np.array([new - 1]) if logits_rows is None else logits_rows
        check_rows(rows, new)
        visible = causal(new, self.length) if visible is None else visible
        is_image = ids == self.spec.image_token_id
        logits = np.empty((len(rows), self.spec.vocab), np.float32)
        buckets = [place.bucket for place in self._places]
        for chunk in plan_chunks(new, self.length, rows, buckets, self._cache.has_room):
            part = slice(chunk.start, chunk.stop)
            seen = self.length + chunk.stop
            if visible[part, seen:].any():
                raise SonoEdgeError("a token sees one that comes after it: this is a defect, report it")
            pictures = None
            if image_embeds is not None and is_image[part].any():
                pictures = image_embeds[is_image[: chunk.start].sum() : is_image[: chunk.stop].sum()]
            inputs = self._inputs(chunk, ids[part], positions[:, part], pictures, visible[part, :seen])
            for run in logits_runs(chunk, buckets[chunk.bucket], rows):
                logits[run.answers] = self._run(chunk, inputs, run)
            self._cache.take_up(buckets[chunk.bucket], self.length + chunk.start, len(chunk))
        self.length += new
        return logits

    def _inputs(
        self,
        chunk: Chunk,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        pictures: npt.NDArray[np.float32] | None,
        visible: npt.NDArray[np.bool_],
    ) -> dict[str, npt.NDArray[Any]]:
        """Inputs of a chunk, padded to its bucket; the rows of logits are missing."""
        bucket, before = self._places[chunk.bucket].bucket, self.length + chunk.start
        columns = self._cache.columns(before, len(chunk))
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": padded(ids[None], bucket.rows),
            "positions": padded(positions[:, None], bucket.rows),
            "attention_bias": attention_bias(visible, columns, (bucket.rows, bucket.seen), self._bias_type),
        }
        if self._in_place:
            inputs["write_at"] = np.array([before])
        if pictures is not None or bucket.rows == self._fewest:  # a CUDA graph takes up every input, every time
            image_embeds = np.zeros((bucket.images, self.spec.hidden), np.float32)
            image_embeds[: 0 if pictures is None else len(pictures)] = 0 if pictures is None else pictures
            inputs["image_embeds"] = image_embeds
        return inputs

    def _run(self, chunk: Chunk, inputs: Mapping[str, npt.NDArray[Any]], run: LogitsRun) -> npt.NDArray[np.float32]:
        """Logits [answers, vocab] of one run."""
        logits: npt.NDArray[np.float32] = self._places[chunk.bucket].step.run({**inputs, "logits_rows": run.rows})
        return logits[: len(run.answers)]

    def close(self) -> None:
        """Free the engines and the cache."""
        self._vision, self._places = [], []
        self._device.close()
