"""What a model needs of a device's memory: while it serves, and while its engines are built.

Sources: NVIDIA, TensorRT documentation, "How TensorRT Works", Memory: a built engine holds about its weights, every
execution context its activations and scratch space; the build keeps at least two copies of the weights in host memory,
the network's and the engine's, and buffers to time layers with. On a Jetson host memory is the GPU's.
What ONNX Runtime takes beside the weights: measured, docs/decisions.md, "One form of int8 weights on disk, row by row".
"""

from __future__ import annotations

import msgspec

from sonoedge.device_profiles.schema import Buckets, Profile
from sonoedge.device_profiles.shape import ModelShape, Weights

# `sonoedge serve` before it opens a model, measured on x86-64: 75 MB, with ONNX Runtime 95 MB.
PROCESS_BYTES = 95_000_000
# NVIDIA's answer to "Very large CPU RAM usage in TensorRT", https://forums.developer.nvidia.com/t/79158: around 800 MB.
TENSORRT_BYTES = 800_000_000
ORT_ROWS_COPY, ORT_TOKEN_COPY, ORT_WEIGHT_ONLY_COPY = 0.6, 1.2, 0.16  # of the weights, beside the weights themselves
BUILD_COPIES = 2
KV_CACHE = "KV cache"
LOGIT_BYTES = 4  # float32 in every form
PASS_ROWS = 256  # of the largest pass where a profile fixes no sizes: what one frame's prompt or hints take


class Use(msgspec.Struct, frozen=True):
    """What a model is asked to do. Counts of tokens are None where nothing says them."""

    context: int  # tokens that the KV cache holds
    image_tokens: int  # of the largest image, after merging
    int8_products: bool  # whether vision and prefill multiply int8 activations
    int8_cache: bool = False
    one_token_form: bool = False  # whether weights are in memory once more, laid out for one token at a time
    prefix_tokens: int | None = None  # up to and with the image
    question_tokens: int | None = None  # behind the prefix, of a short question
    hint_tokens: int | None = None  # behind the prefix, of all hints
    hint_rows: int | None = None  # whose logits the hints need


class Need(msgspec.Struct, frozen=True):
    """One part of the memory."""

    name: str
    bytes: int


class Memory(msgspec.Struct, frozen=True):
    """All parts, and what of the device is left for them; None where the profile does not know."""

    serving: tuple[Need, ...]
    building: tuple[Need, ...]  # on the device; empty where nothing is built there
    capacity_bytes: int | None
    system_bytes: int | None
    second_form_bytes: int  # what laying weights out for one token at a time costs beside `serving`

    @property
    def serving_bytes(self) -> int:
        """While it serves."""
        return sum(need.bytes for need in self.serving)

    @property
    def building_bytes(self) -> int:
        """While engines are built."""
        return sum(need.bytes for need in self.building)

    @property
    def peak_bytes(self) -> int:
        """The larger of both."""
        return max(self.serving_bytes, self.building_bytes)

    @property
    def room_bytes(self) -> int | None:
        """What the system leaves: all of the memory where its share is not known; None where nothing is."""
        return None if self.capacity_bytes is None else self.capacity_bytes - (self.system_bytes or 0)

    @property
    def fits(self) -> bool | None:
        """Whether there is room for the peak."""
        return None if self.room_bytes is None else self.peak_bytes <= self.room_bytes


def plan_memory(shape: ModelShape, weights: Weights, use: Use, profile: Profile) -> Memory:
    """Add up what `use` of a model needs on a device."""
    tensorrt = profile.backend == "tensorrt"
    sizes = _Sizes.of(use, profile.buckets)
    runtime = [Need("process", PROCESS_BYTES)]
    if tensorrt:
        runtime.append(Need("CUDA and TensorRT libraries", TENSORRT_BYTES))
        workspace = 2 * weights.largest_matrix  # once in 16 bit, should a weight-only product not be fused
        second_form = weights.decoder
        beside = second_form if use.one_token_form else 0
    else:
        rows = ORT_ROWS_COPY if use.int8_products else ORT_WEIGHT_ONLY_COPY
        second_form = round(ORT_TOKEN_COPY * weights.decoder)
        beside = round(rows * weights.stored) + (second_form if use.one_token_form else 0)
        workspace = 0
    activations = _activations(shape, sizes, value_bytes=2 if tensorrt else 4)
    serving = [
        Need("weights", weights.stored),
        Need("weights, laid out again", beside),
        Need(KV_CACHE, cache_bytes(shape, sizes.capacity, use, profile)),
        Need("activations", activations),
        Need("logits", sizes.logits_rows * shape.vocab * LOGIT_BYTES),
        Need("engine workspace", workspace),
        *runtime,
    ]
    building: list[Need] = []
    if tensorrt:
        copies = BUILD_COPIES if profile.memory.shared_with_gpu else 1
        largest = max(weights.vision, weights.decoder)
        building = [
            Need(
                f"weights of the largest engine, {copies} times" if copies > 1 else "largest engine", copies * largest
            ),
            Need("buffers to time layers with", activations + workspace),
            *runtime,
        ]
    memory = profile.memory
    return Memory(
        serving=tuple(need for need in serving if need.bytes),
        building=tuple(building),
        capacity_bytes=memory.capacity_bytes if isinstance(memory.capacity_bytes, int) else None,
        system_bytes=memory.system_bytes if isinstance(memory.system_bytes, int) else None,
        second_form_bytes=second_form,
    )


def cache_bytes(shape: ModelShape, tokens: int, use: Use, profile: Profile) -> int:
    """Keys and values of `tokens` tokens."""
    return 2 * shape.layers * shape.kv_width * tokens * cache_bits(use, profile) // 8


def cache_bits(use: Use, profile: Profile) -> int:
    """Of one value in the KV cache: TensorRT updates 16-bit caches only, ONNX Runtime keeps int8 or float32."""
    if profile.backend == "tensorrt":
        return 16
    return 8 if use.int8_cache else 32


def bucket(tokens: int, sizes: tuple[int, ...] | None) -> int:
    """The static size that holds `tokens`; as many as there are where sizes are free, or none is large enough."""
    return next((size for size in sizes or () if size >= tokens), tokens)


class _Sizes(msgspec.Struct, frozen=True):
    """Tokens that buffers are made for."""

    rows: int  # of the largest pass
    seen: int
    capacity: int
    image_tokens: int
    logits_rows: int

    @staticmethod
    def of(use: Use, buckets: Buckets | None) -> _Sizes:
        logits_rows = use.hint_rows or 1
        if buckets is None:
            passes = (use.prefix_tokens, use.hint_tokens)
            rows = min(max((rows for rows in passes if rows is not None), default=PASS_ROWS), use.context)
            return _Sizes(rows, use.context, use.context, use.image_tokens, logits_rows)
        rows = buckets.prefill_tokens[-1]
        return _Sizes(
            rows,
            bucket(use.context, buckets.context_tokens),
            use.context + rows,  # padded rows are written behind the last token
            bucket(use.image_tokens, buckets.image_tokens),
            logits_rows,
        )


def _activations(shape: ModelShape, sizes: _Sizes, value_bytes: int) -> int:
    """What is alive at once in the widest place of each stage, scores of attention included; stages keep their own."""
    experts = shape.experts
    routed = 0 if experts is None else max(experts.chosen * experts.width, experts.shared_width)
    width = max(shape.query_width + 2 * shape.kv_width, 3 * max(shape.dense_width, routed))
    decoder = sizes.rows * (2 * shape.hidden + width) + shape.heads * sizes.rows * sizes.seen
    vision = 0
    if shape.vision is not None:
        patches = sizes.image_tokens * shape.vision.merge**2
        inner = max(3 * shape.vision.width, (3 if shape.vision.gated else 2) * shape.vision.mlp_width)
        vision = patches * (2 * shape.vision.width + inner) + shape.vision.heads * patches**2
        vision += sizes.image_tokens * shape.hidden
    return (decoder + vision) * value_bytes
