"""The calibration table: its bytes, its hash, routing by region, and the refusal of experts that saw too little."""

import msgspec
import pytest
import torch

from sonoedge.calibration.table import CalibrationTable, RoutingRow
from sonoedge.errors import SonoEdgeError

FIRST, SECOND = "model.layers.0.moe.experts", "model.layers.1.moe.experts"


def table_of(tokens: dict[str, list[int]]) -> CalibrationTable:
    return msgspec.structs.replace(CalibrationTable.empty(), expert_tokens=tokens)


def test_bytes_and_hash_follow_content_not_order() -> None:
    one = CalibrationTable(
        2, "mse", {"a": 1.0, "b": 2.0}, {"k": 3.0, "v": 4.0}, {FIRST: [1, 2]}, {"liver": {}, "heart": {}}, {}, "f" * 64
    )
    other = CalibrationTable(
        2, "mse", {"b": 2.0, "a": 1.0}, {"v": 4.0, "k": 3.0}, {FIRST: [1, 2]}, {"heart": {}, "liver": {}}, {}, "f" * 64
    )
    assert one.encoded() == other.encoded()
    assert one.sha256 == other.sha256
    changes: list[dict[str, object]] = [
        {"frames": 3},
        {"observer": "entropy"},
        {"input_maximum": {"a": 1.0, "b": 2.5}},
        {"cache_maximum": {"k": 3.0, "v": 4.5}},
        {"expert_tokens": {FIRST: [1, 3]}},
        {"alphas": {"g": 0.5}},
        {"smoothing_sha256": None},
    ]
    hashes = {msgspec.structs.replace(one, **change).sha256 for change in changes}
    assert len(hashes | {one.sha256}) == len(changes) + 1


def test_a_table_comes_back_from_its_bytes() -> None:
    table = CalibrationTable(2, "mse", {"a": 0.1}, {"k": 3.0}, {FIRST: [1, 2]}, {"liver": {FIRST: [1, 0]}}, {}, None)
    assert msgspec.json.decode(table.encoded(), type=CalibrationTable) == table


def test_routing_is_counted_by_region_where_it_is_known() -> None:
    table = CalibrationTable.empty()
    table.add_routing(FIRST, torch.tensor([[True, False, True], [True, True, False]]), "liver")
    table.add_routing(FIRST, torch.tensor([[False, True, True]]), None)
    table.add_routing(SECOND, torch.tensor([[True, False, False]]), "heart")
    table.add_routing(FIRST, torch.tensor([[True, False, True]]), "liver")
    assert table.expert_tokens == {FIRST: [3, 2, 3], SECOND: [1, 0, 0]}
    assert table.region_tokens == {"liver": {FIRST: [3, 1, 2]}, "heart": {SECOND: [1, 0, 0]}}
    rows = table.routing_rows()
    assert rows == (
        RoutingRow("all", FIRST, (3, 2, 3)),
        RoutingRow("all", SECOND, (1, 0, 0)),
        RoutingRow("heart", SECOND, (1, 0, 0)),
        RoutingRow("liver", FIRST, (3, 1, 2)),
    )
    assert rows[0].shares == (0.375, 0.25, 0.375)
    assert RoutingRow("all", FIRST, (0, 0)).shares == (0.0, 0.0)


def test_tables_share_no_counts() -> None:
    CalibrationTable.empty().add_routing(FIRST, torch.ones(3, 2, dtype=torch.bool), "liver")
    assert CalibrationTable.empty().expert_tokens == {}


def test_too_few_tokens_name_layer_expert_and_the_way_out() -> None:
    table = table_of({FIRST: [7, 5], SECOND: [9, 4]})
    table.require_coverage(4)
    wanted = (
        r"^calibration gave model\.layers\.1\.moe\.experts\.1 only 4 tokens of the 5 that "
        r"calibration\.least_expert_tokens asks for: calibrate on more, or on more varied, frames$"
    )
    with pytest.raises(SonoEdgeError, match=wanted):
        table.require_coverage(5)
    with pytest.raises(SonoEdgeError, match=r"experts\.1 only 4 tokens of the 8 .*, and 2 other experts too few: "):
        table.require_coverage(8)


def test_an_expert_never_seen_is_refused_and_a_dense_model_is_not() -> None:
    table = CalibrationTable.empty()
    table.require_coverage(10)
    table.add_routing(FIRST, torch.tensor([[True, False]]), None)
    with pytest.raises(SonoEdgeError, match=r"layers\.0\.moe\.experts\.1 only 0 tokens of the 1 "):
        table.require_coverage(1)
