"""Static expert dispatch in numbers: the bound on blocks, shapes of buffers, parameters of kernels, tiles and grids.

Routing depends on data and an engine wants fixed shapes. N tokens that choose k of E experts, sorted by expert and cut
into blocks of `block_rows` rows of one expert each, fill at most ceil(N·k / block_rows) + E - 1 blocks; the rest are
marked empty. Every function of `tokens` takes what has +, * and // with an integer at its right, so that a plugin may
pass TensorRT's symbolic dimensions. Imports neither triton nor torch: a device reads this too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeVar

import msgspec

from sonoedge.errors import SonoEdgeError

DOMAIN = "sonoedge"  # of the operators, in ONNX and as the plugins' namespace
WIDTH_MULTIPLE = 16  # of the hidden and inner sizes: 16 bytes of int8 weights are one load
POINTER_ALIGNMENT_BYTES = 16  # of every buffer; what the kernels are compiled for
BLOCK_ROWS = (16, 32, 64, 128)
DECODE_TOKENS = 8  # the most that the two decode operators take
INT32_LIMIT = 1 << 31
LARGEST_STEP = 128 * 128 * 64  # products of one output that a program of prefill takes at once

Activation = Literal["float16", "bfloat16", "float32"]
Dtype = Literal["A", "float32", "int8", "int32"]  # A is the activation type


class Size(Protocol):
    """An integer, or a symbolic dimension."""

    def __add__(self: N, other: int, /) -> N: ...
    def __mul__(self: N, other: int, /) -> N: ...
    def __floordiv__(self: N, other: int, /) -> N: ...


N = TypeVar("N", bound=Size)


class Experts(msgspec.Struct, frozen=True):
    """What a node of experts says of itself: the attributes of every operator here, under these names.

    experts E, chosen k, hidden H, inner I; block_rows: rows of a prefill block; norm_topk_prob: whether the weights of
    the chosen experts are made to sum to one.
    """

    experts: int
    chosen: int
    hidden: int
    inner: int
    norm_topk_prob: bool
    block_rows: int = 64

    def check(self, tokens: int) -> None:
        """Raise SonoEdgeError where the kernels cannot compute these experts for that many tokens."""
        if not 0 < self.chosen <= self.experts:
            raise SonoEdgeError(f"chosen = {self.chosen} of experts = {self.experts}: choose between 1 and all of them")
        for name, width in (("hidden", self.hidden), ("inner", self.inner)):
            if width <= 0 or width % WIDTH_MULTIPLE:
                raise SonoEdgeError(f"{name} = {width} is no multiple of {WIDTH_MULTIPLE}: pad the experts' weights")
        if self.block_rows not in BLOCK_ROWS:
            raise SonoEdgeError(f"block_rows = {self.block_rows}: choose one of {', '.join(map(str, BLOCK_ROWS))}")
        # Offsets inside one expert's weights and inside an activation are 32 bits wide; the expert's own offset is 64.
        largest = max(2 * self.inner * self.hidden, self.slots(tokens) * max(self.hidden, self.inner))
        if largest >= INT32_LIMIT:
            raise SonoEdgeError(
                f"{tokens} tokens of hidden = {self.hidden} and inner = {self.inner} need offsets of more than 31 "
                "bits: take fewer tokens at once"
            )

    def blocks(self, tokens: N) -> N:
        """Bound on blocks: exact, whatever the routing."""
        return ceil_div(tokens * self.chosen, self.block_rows) + (self.experts - 1)

    def slots(self, tokens: N) -> N:
        """Rows of the buffers that hold one row for each token and chosen expert, blocks padded."""
        return self.blocks(tokens) * self.block_rows


class Buffer(msgspec.Struct, frozen=True):
    """A pointer parameter of a kernel."""

    name: str
    dtype: Dtype


class Tile(msgspec.Struct, frozen=True):
    """A tactic: constants that the kernel is compiled with beside the node's own, and its launch."""

    name: str
    num_warps: int
    num_stages: int
    constants: Mapping[str, int]


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """One operator and the kernel that computes it.

    Parameters, in order: `inputs`, `tokens` (int32, the only scalar), `outputs`, then `constants`, compiled in by name:
    those of the node and those of the tile.
    """

    operator: str
    module: str  # under sonoedge.export.plugins
    function: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    constants: tuple[str, ...]

    def values(self, experts: Experts, tile: Tile) -> dict[str, int]:
        """Every constant as a number, in the order of the kernel's parameters."""
        known: dict[str, int] = {**msgspec.structs.asdict(experts), **tile.constants}
        return {name: int(known[name]) for name in self.constants}


def ceil_div(value: N, divisor: int) -> N:
    """value / divisor rounded up; value may be symbolic."""
    return (value + (divisor - 1)) // divisor


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value` (> 0)."""
    return 1 << (value - 1).bit_length()


def default_block_rows(tokens: int, experts: int, chosen: int) -> int:
    """Block rows for a usual number of tokens: the widest block that an evenly loaded expert still fills twice."""
    rows = tokens * chosen // experts
    fitting = [block for block in BLOCK_ROWS if 2 * block <= rows]
    return fitting[-1] if fitting else BLOCK_ROWS[0]


def _buffers(**dtypes: Dtype) -> tuple[Buffer, ...]:
    return tuple(Buffer(name, dtype) for name, dtype in dtypes.items())


ROUTE = Kernel(
    operator="ExpertRoute",
    module="prefill",
    function="expert_route",
    inputs=_buffers(x="A", logits="float32", input_scale="float32"),
    outputs=_buffers(
        x_int8="int8", block_expert="int32", slot_token="int32", slot_weight="float32", token_slot="int32"
    ),
    constants=(
        "experts", "chosen", "hidden", "block_rows", "norm_topk_prob", "block_experts", "block_tokens", "block_values"
    ),
)  # fmt: skip
UP = Kernel(
    operator="ExpertUp",
    module="prefill",
    function="expert_up",
    inputs=_buffers(
        x_int8="int8", gate_up_values="int8", gate_up_scale="float32", input_scale="float32", hidden_scale="float32",
        block_expert="int32", slot_token="int32",
    ),
    outputs=_buffers(inner_int8="int8"),
    constants=("experts", "chosen", "hidden", "inner", "block_rows", "block_inner", "block_k", "group"),
)  # fmt: skip
DOWN = Kernel(
    operator="ExpertDown",
    module="prefill",
    function="expert_down",
    inputs=_buffers(
        inner_int8="int8", down_values="int8", down_scale="float32", hidden_scale="float32", block_expert="int32",
        slot_weight="float32",
    ),
    outputs=_buffers(parts="A"),
    constants=("experts", "chosen", "hidden", "inner", "block_rows", "block_hidden", "block_k", "group"),
)  # fmt: skip
SUM = Kernel(
    operator="ExpertSum",
    module="prefill",
    function="expert_sum",
    inputs=_buffers(parts="A", token_slot="int32"),
    outputs=_buffers(y="A"),
    constants=("chosen", "hidden", "block_hidden"),
)
UP_DECODE = Kernel(
    operator="ExpertUpDecode",
    module="decode",
    function="expert_up_decode",
    inputs=_buffers(x="A", logits="float32", gate_up_values="int8", gate_up_scale="float32"),
    outputs=_buffers(inner_float="A"),
    constants=(
        "experts", "chosen", "hidden", "inner", "block_experts", "block_tokens", "block_inner", "block_k", "splits"
    ),
)  # fmt: skip
DOWN_DECODE = Kernel(
    operator="ExpertDownDecode",
    module="decode",
    function="expert_down_decode",
    inputs=_buffers(inner_float="A", logits="float32", down_values="int8", down_scale="float32"),
    outputs=_buffers(y="A"),
    constants=(
        "experts", "chosen", "hidden", "inner", "norm_topk_prob", "block_experts", "block_tokens", "block_hidden",
        "block_k", "splits",
    ),
)  # fmt: skip
PREFILL = (ROUTE, UP, DOWN, SUM)
DECODE = (UP_DECODE, DOWN_DECODE)
KERNELS: Mapping[str, Kernel] = {kernel.operator: kernel for kernel in (*PREFILL, *DECODE)}


def output_shapes(operator: str, experts: Experts, tokens: N) -> tuple[tuple[N | int, ...], ...]:
    """Shape of each output of an operator, in order."""
    slots = experts.slots(tokens)
    shapes: dict[str, tuple[tuple[N | int, ...], ...]] = {
        "ExpertRoute": (
            (tokens, experts.hidden), (experts.blocks(tokens),), (slots,), (slots,), (tokens, experts.chosen)
        ),
        "ExpertUp": ((slots, experts.inner),),
        "ExpertDown": ((slots, experts.hidden),),
        "ExpertSum": ((tokens, experts.hidden),),
        "ExpertUpDecode": ((tokens, experts.experts, experts.inner),),
        "ExpertDownDecode": ((tokens, experts.hidden),),
    }  # fmt: skip
    return shapes[operator]


def grid(operator: str, experts: Experts, tile: Tile, tokens: N) -> tuple[N | int, N | int, N | int]:
    """Programs of a launch along x, y and z."""
    of = tile.constants
    grids: dict[str, Callable[[], tuple[N | int, N | int]]] = {
        # The first program routes, each further one quantizes `block_values` activations.
        "ExpertRoute": lambda: (ceil_div(tokens * experts.hidden, of["block_values"]) + 1, 1),
        # One axis, so that the kernel itself orders the programs for the L2 cache.
        "ExpertUp": lambda: (experts.blocks(tokens) * ceil_div(experts.inner, of["block_inner"]), 1),
        "ExpertDown": lambda: (experts.blocks(tokens) * ceil_div(experts.hidden, of["block_hidden"]), 1),
        "ExpertSum": lambda: (tokens, ceil_div(experts.hidden, of["block_hidden"])),
        "ExpertUpDecode": lambda: (ceil_div(experts.inner, of["block_inner"]), experts.experts),
        "ExpertDownDecode": lambda: (ceil_div(experts.hidden, of["block_hidden"]), 1),
    }
    return (*grids[operator](), 1)


def tiles(operator: str, experts: Experts, tokens: int) -> tuple[Tile, ...]:
    """The tactics of an operator, the likeliest first; all give the same integers, and floats within rounding."""
    return _TILES[operator](experts, tokens)


def _route_tiles(experts: Experts, tokens: int) -> tuple[Tile, ...]:
    # Routing is one program, so it takes many tokens at once: eight values of [block_tokens, block_experts] a lane.
    wide = power_of_two(experts.experts)
    rows = max(16, min(512, 2048 // wide, power_of_two(tokens)))
    warps = max(4, min(8, rows * wide // 256))
    constants = {"block_experts": wide, "block_tokens": rows, "block_values": 1024 * warps}
    return (Tile("route", num_warps=warps, num_stages=1, constants=constants),)


def _product_tiles(columns: str, experts: Experts, widths: tuple[int, ...]) -> tuple[Tile, ...]:
    found = []
    for width in widths:
        for depth, stages in ((64, 4), (128, 3)):
            # Larger steps spill registers.
            if experts.block_rows * width * depth > LARGEST_STEP:
                continue
            # One warp of 32 lanes holds at most 128 accumulators a lane.
            warps = 8 if experts.block_rows * width >= 128 * 128 else 4
            constants = {columns: width, "block_k": depth, "group": 8}
            found.append(Tile(f"n{width}k{depth}", warps, stages, constants))
    return tuple(found)


def _up_tiles(experts: Experts, _tokens: int) -> tuple[Tile, ...]:
    # Gate and up are two sums: of 128 by 128 they leave no register for anything else.
    return _product_tiles("block_inner", experts, (64, 128) if experts.block_rows <= 64 else (64,))


def _down_tiles(experts: Experts, _tokens: int) -> tuple[Tile, ...]:
    return _product_tiles("block_hidden", experts, (128, 256) if experts.block_rows <= 64 else (128, 64))


def _sum_tiles(experts: Experts, _tokens: int) -> tuple[Tile, ...]:
    width = min(2048, power_of_two(experts.hidden))
    return (Tile(f"n{width}", num_warps=4, num_stages=1, constants={"block_hidden": width}),)


def _decode_tiles(rows: str, experts: Experts, tokens: int, shapes: tuple[tuple[int, int], ...]) -> tuple[Tile, ...]:
    """Rows of weights times a token lane by lane for one token, then matrix units, whose instructions hold eight."""
    wide = power_of_two(experts.experts)
    found = []
    if tokens == 1:
        for height, depth in shapes:
            constants = {"block_experts": wide, "block_tokens": 1, rows: height, "block_k": depth, "splits": 0}
            found.append(Tile(f"lanes{height}x{depth}", 4, 1, constants))
    for depth, stages in ((512, 3), (256, 4)):
        constants = {"block_experts": wide, "block_tokens": DECODE_TOKENS, rows: 16, "block_k": depth, "splits": 4}
        found.append(Tile(f"matrix16x{depth}", 4, stages, constants))
    return tuple(found)


def _up_decode_tiles(experts: Experts, tokens: int) -> tuple[Tile, ...]:
    return _decode_tiles("block_inner", experts, tokens, ((4, 1024), (8, 512), (4, 512)))


def _down_decode_tiles(experts: Experts, tokens: int) -> tuple[Tile, ...]:
    return _decode_tiles("block_hidden", experts, tokens, ((8, 512), (8, 1024), (4, 512)))


_TILES: Mapping[str, Callable[[Experts, int], tuple[Tile, ...]]] = {
    "ExpertRoute": _route_tiles,
    "ExpertUp": _up_tiles,
    "ExpertDown": _down_tiles,
    "ExpertSum": _sum_tiles,
    "ExpertUpDecode": _up_decode_tiles,
    "ExpertDownDecode": _down_decode_tiles,
}
