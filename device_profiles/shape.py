"""The sizes of a vision-language model and what its weights take: all that a plan needs to know of a model."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

Matrix = tuple[int, int]  # rows (outputs), columns (inputs)


class WeightFormat(msgspec.Struct, frozen=True):
    """How the values of a matrix are stored; `group` inputs of a row share a scale (None: all of them)."""

    bits: int
    scale_bits: int = 0
    group: int | None = None

    def size(self, matrix: Matrix) -> int:
        """Bytes of values and scales."""
        rows, columns = matrix
        scales = rows if self.group is None else rows * -(-columns // self.group)
        return (rows * columns * self.bits + scales * self.scale_bits) // 8


class Formats(msgspec.Struct, frozen=True):
    """How each part of a model is stored; vectors (norms, biases) and routers have `vector_bits`."""

    layers: WeightFormat
    head: WeightFormat
    embeddings: WeightFormat
    vision: WeightFormat
    vector_bits: int = 32


_INT8_ROWS = WeightFormat(bits=8, scale_bits=32)
INT8 = Formats(layers=_INT8_ROWS, head=_INT8_ROWS, embeddings=_INT8_ROWS, vision=_INT8_ROWS)  # what a bundle holds


class Experts(msgspec.Struct, frozen=True):
    """The mixture of experts in every layer; `shared_width` of the expert that every token passes, 0 where none is."""

    count: int
    chosen: int
    width: int
    shared_width: int = 0


class VisionShape(msgspec.Struct, frozen=True):
    """Sizes of the vision tower; `mergers` is how many times merged patches are brought to the decoder's width.

    gated: as Qwen2.5-VL has it, three matrices a feed-forward and norms without biases. Its windows are not counted:
    graphs multiply every pair of patches and mask those of other windows.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch_values: int
    merge: int = 2
    mergers: int = 1
    gated: bool = False

    @property
    def merged_width(self) -> int:
        """Width of the patches that make one image token."""
        return self.width * self.merge**2


class ModelShape(msgspec.Struct, frozen=True):
    """Sizes of a decoder with its vision tower (None: text only, or not looked at)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_width: int  # of the path without routing; 0 where there is none
    vocab: int
    tied: bool  # whether the head reads the embeddings
    experts: Experts | None = None
    vision: VisionShape | None = None

    @property
    def query_width(self) -> int:
        """Width of the queries of one token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of one token."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """How many a checkpoint of these sizes holds."""
        vision = 0 if self.vision is None else values(vision_matrices(self)) + _vision_vectors(self)
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return vision + ends + self.layers * values(layer_matrices(self) + expert_matrices(self)) + _vectors(self)


class Weights(msgspec.Struct, frozen=True):
    """Bytes of weights by what reads them: the head is counted where it is read, tied or not."""

    vision: int
    embeddings: int
    layers: int  # without routed experts
    experts: int  # all of them
    head: int
    tied: bool
    largest_matrix: int  # values

    @property
    def decoder(self) -> int:
        """Bytes that the decoder keeps in memory."""
        return self.embeddings + self.layers + self.experts + (0 if self.tied else self.head)

    @property
    def stored(self) -> int:
        """Bytes of all of them."""
        return self.vision + self.decoder


def weigh(shape: ModelShape, formats: Formats = INT8) -> Weights:
    """What a model of these sizes takes in these formats."""
    ends = (shape.vocab, shape.hidden)
    vectors = _vectors(shape) * formats.vector_bits // 8
    vision = 0
    if shape.vision is not None:
        vision = _sized(vision_matrices(shape), formats.vision) + _vision_vectors(shape) * formats.vector_bits // 8
    matrices = [ends, *layer_matrices(shape), *expert_matrices(shape), *vision_matrices(shape)]
    return Weights(
        vision=vision,
        embeddings=formats.embeddings.size(ends),
        layers=shape.layers * _sized(layer_matrices(shape), formats.layers) + vectors,
        experts=shape.layers * _sized(expert_matrices(shape), formats.layers),
        head=formats.head.size(ends),
        tied=shape.tied,
        largest_matrix=max(rows * columns for rows, columns in matrices),
    )


def values(matrices: Iterable[Matrix]) -> int:
    """How many values matrices hold."""
    return sum(rows * columns for rows, columns in matrices)


def layer_matrices(shape: ModelShape) -> list[Matrix]:
    """The matrices of one layer that every token is multiplied with."""
    attention = [(shape.query_width, shape.hidden), *[(shape.kv_width, shape.hidden)] * 2]
    shared = 0 if shape.experts is None else shape.experts.shared_width
    return [*attention, (shape.hidden, shape.query_width), *_swiglu(shape, shape.dense_width), *_swiglu(shape, shared)]


def expert_matrices(shape: ModelShape) -> list[Matrix]:
    """The matrices of all routed experts of one layer."""
    return [] if shape.experts is None else _swiglu(shape, shape.experts.width) * shape.experts.count


def vision_matrices(shape: ModelShape) -> list[Matrix]:
    """All matrices of the vision tower, the convolution over patches as the matrix it stands for."""
    vision = shape.vision
    if vision is None:
        return []
    return [(vision.width, vision.patch_values), *block_matrices(vision) * vision.layers, *merger_matrices(shape)]


def block_matrices(vision: VisionShape) -> list[Matrix]:
    """The matrices of one block of the vision tower."""
    width, inner = vision.width, vision.mlp_width
    return [(3 * width, width), (width, width), (2 * inner if vision.gated else inner, width), (width, inner)]


def merger_matrices(shape: ModelShape) -> list[Matrix]:
    """The matrices that turn merged patches into image tokens."""
    if shape.vision is None:
        return []
    merged = shape.vision.merged_width
    return [(merged, merged), (shape.hidden, merged)] * shape.vision.mergers


def _swiglu(shape: ModelShape, width: int) -> list[Matrix]:
    return [(2 * width, shape.hidden), (shape.hidden, width)] if width else []


def _sized(matrices: Iterable[Matrix], form: WeightFormat) -> int:
    return sum(form.size(matrix) for matrix in matrices)


def _vectors(shape: ModelShape) -> int:
    """Norms, biases of queries, keys and values, and the small matrices that route and blend, which stay float."""
    layer = 2 * shape.hidden + shape.query_width + 2 * shape.kv_width
    if shape.experts is not None:
        layer += shape.experts.count * shape.hidden
        if shape.experts.shared_width:
            layer += shape.hidden
        if shape.dense_width:
            layer += 2 * shape.hidden + 2
    return shape.layers * layer + shape.hidden


def _vision_vectors(shape: ModelShape) -> int:
    vision = shape.vision
    assert vision is not None  # asked only where there is one
    norm, inner = (vision.width, 2 * vision.mlp_width) if vision.gated else (2 * vision.width, vision.mlp_width)
    block = 2 * norm + 3 * vision.width + vision.width + inner + vision.width
    merger = norm + vision.merged_width + shape.hidden
    return vision.layers * block + vision.mergers * merger
