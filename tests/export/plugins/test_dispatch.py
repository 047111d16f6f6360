"""The static bound holds for every routing and is reached by one; sizes that no kernel can compute are refused."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins import dispatch
from sonoedge.export.plugins.dispatch import Experts

ECHOVLM = Experts(experts=4, chosen=2, hidden=3584, inner=1408, norm_topk_prob=False, block_rows=64)


@given(st.data(), st.integers(1, 6), st.integers(1, 80), st.sampled_from(dispatch.BLOCK_ROWS))
def test_no_routing_needs_more_blocks(data: st.DataObject, experts: int, tokens: int, rows: int) -> None:
    chosen = data.draw(st.integers(1, experts))
    takes = data.draw(st.lists(st.permutations(range(experts)), min_size=tokens, max_size=tokens))
    counts = [sum(expert in order[:chosen] for order in takes) for expert in range(experts)]
    used = sum(-(-count // rows) for count in counts)
    spec = Experts(experts, chosen, 16, 16, False, rows)
    assert used <= spec.blocks(tokens)
    assert spec.slots(tokens) == spec.blocks(tokens) * rows


def test_the_bound_is_reached() -> None:
    # Each expert with one row in its last block.
    spec = Experts(4, 1, 16, 16, False, 16)
    counts = (1, 1, 1, 17)
    assert sum(-(-count // 16) for count in counts) == spec.blocks(sum(counts)) == 5


@pytest.mark.parametrize("operator", dispatch.KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("many", [1, 512])
def test_tiles_give_every_constant_and_a_grid_that_covers_the_outputs(operator: str, tokens: int, many: int) -> None:
    if not operator.endswith("Decode"):  # which takes eight tokens at most
        tokens *= many
    kernel = dispatch.KERNELS[operator]
    found = dispatch.tiles(operator, ECHOVLM, tokens)
    assert len({tile.name for tile in found}) == len(found) > 0
    for tile in found:
        values = kernel.values(ECHOVLM, tile)
        assert tuple(values) == kernel.constants
        programs = dispatch.grid(operator, ECHOVLM, tile, tokens)
        covered: dict[str, Callable[[dict[str, int], tuple[int, int, int]], bool]] = {
            "ExpertRoute": lambda v, p: (p[0] - 1) * v["block_values"] >= tokens * 3584,
            "ExpertUp": lambda v, p: p[0] * v["block_inner"] >= ECHOVLM.blocks(tokens) * 1408,
            "ExpertDown": lambda v, p: p[0] * v["block_hidden"] >= ECHOVLM.blocks(tokens) * 3584,
            "ExpertSum": lambda v, p: (p[0], p[1] * v["block_hidden"] >= 3584) == (tokens, True),
            "ExpertUpDecode": lambda v, p: (p[0] * v["block_inner"] >= 1408, p[1]) == (True, 4),
            "ExpertDownDecode": lambda v, p: p[0] * v["block_hidden"] >= 3584,
        }
        assert covered[operator](values, programs)
        assert programs[1] <= 65535
        assert programs[2] == 1


class Symbol:
    """A dimension that knows no more than TensorRT's do: an operation with an integer at its right."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: int) -> "Symbol":
        return Symbol(f"({self.text} + {other})")

    def __mul__(self, other: int) -> "Symbol":
        return Symbol(f"({self.text} * {other})")

    def __floordiv__(self, other: int) -> "Symbol":
        return Symbol(f"({self.text} // {other})")


@pytest.mark.parametrize("operator", dispatch.KERNELS)
def test_shapes_and_grids_take_symbols(operator: str) -> None:
    for tokens in (1, 7):
        tile = dispatch.tiles(operator, ECHOVLM, tokens)[0]

        def number(value: object, tokens: int = tokens) -> object:
            return eval(value.text, {"n": tokens}) if isinstance(value, Symbol) else value

        symbolic = dispatch.grid(operator, ECHOVLM, tile, Symbol("n"))
        assert tuple(map(number, symbolic)) == dispatch.grid(operator, ECHOVLM, tile, tokens)
        shapes = dispatch.output_shapes(operator, ECHOVLM, Symbol("n"))
        numbers = tuple(tuple(map(number, shape)) for shape in shapes)
        assert numbers == dispatch.output_shapes(operator, ECHOVLM, tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chosen": 5}, "chosen = 5 of experts = 4"),
        ({"chosen": 0}, "chosen = 0 of experts = 4"),
        ({"hidden": 3592}, "hidden = 3592 is no multiple of 16"),
        ({"inner": 0}, "inner = 0 is no multiple of 16"),
        ({"block_rows": 48}, "block_rows = 48"),
        ({"inner": 1 << 20}, "offsets of more than 31 bits"),
    ],
)
def test_sizes_without_kernels_are_refused(wrong: dict[str, int], message: str) -> None:
    ECHOVLM.check(4096)
    with pytest.raises(SonoEdgeError, match=message):
        msgspec.structs.replace(ECHOVLM, **wrong).check(4096)


def test_widths_eight_times_larger_are_within_reach() -> None:
    msgspec.structs.replace(ECHOVLM, hidden=8 * 3584, inner=8 * 1408).check(8)


def test_usual_block_rows_follow_the_load() -> None:
    assert [dispatch.default_block_rows(tokens, 4, 2) for tokens in (1, 64, 256, 1024, 4096)] == [16, 16, 64, 128, 128]
