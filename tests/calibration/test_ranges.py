"""Activation ranges: the largest input of each product, tokens a expert got, and refusals that name the product."""

import pytest
import torch
from torch import nn

from sonoedge.calibration.ranges import RangeTable, observe
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import MoEConfig
from sonoedge.export.models.moe import SparseMoE


@pytest.fixture
def moe() -> SparseMoE:
    """Four experts, two of which win: the last one never."""
    torch.manual_seed(3)
    made = SparseMoE(6, MoEConfig(2, 5, 8, num_experts=4))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
        made.gate.weight[3] = 0
        made.gate.weight[:3].abs_().mul_(3)  # inputs are positive below, so three logits are and one is zero
    return made


def test_the_largest_input_over_all_calls_is_kept() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    with observe({"a": first}, {"b": first}, {}) as table:
        for scale in (1.0, -5.0, 2.0):
            second(first(torch.full((2, 3), scale)))
    assert table.input_maximum["a"] == 5.0
    with torch.no_grad():
        outputs = [first(torch.full((1, 3), scale)).abs().max() for scale in (1.0, -5.0, 2.0)]
    assert table.input_maximum["b"] == pytest.approx(float(max(outputs)))


def test_nothing_is_observed_afterwards() -> None:
    layer = nn.Linear(3, 4)
    with observe({"a": layer}, {"b": layer}, {}) as table:
        layer(torch.ones(1, 3))
    before = dict(table.input_maximum)
    layer(torch.full((1, 3), 100.0))
    assert table.input_maximum == before


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_their_product(wrong: float) -> None:
    layer = nn.Linear(3, 4)
    refused = pytest.raises(SonoEdgeError, match=r"the input of visual\.blocks\.1\.attn\.qkv is not finite")
    with refused, observe({"visual.blocks.1.attn.qkv": layer}, {}, {}):
        layer(torch.tensor([[0.0, wrong, 1.0]]))
    layer(torch.tensor([[wrong, 0.0, 0.0]]))  # the observer is gone after an error too


def test_experts_are_measured_on_their_own_tokens_alone(moe: SparseMoE) -> None:
    x = torch.rand(2, 9, 6) + 0.1
    with observe({}, {}, {"layer.experts": moe}) as table:
        moe(x[:1])
        moe(x[1:])
    tokens = table.expert_tokens["layer.experts"]
    assert sum(tokens) == 2 * 9 * 2
    assert tokens[3] == 0
    assert all(count > 0 for count in tokens[:3])
    assert table.input_maximum["layer.experts"] == pytest.approx(float(x.max()))
    assert "layer.experts.3.down_proj" not in table.input_maximum
    with torch.no_grad():
        chosen, hidden = moe.route(moe.gate(x)) > 0, moe.expert_hidden(x)
    for expert in range(3):
        wanted = float(hidden[..., expert, :][chosen[..., expert]].abs().max())
        assert table.input_maximum[f"layer.experts.{expert}.down_proj"] == pytest.approx(wanted)


def test_too_few_tokens_name_layer_and_expert() -> None:
    table = RangeTable(9, {}, {"model.layers.0.moe.experts": [7, 5], "model.layers.1.moe.experts": [9, 4]})
    table.require_coverage(4)
    with pytest.raises(SonoEdgeError, match=r"gave model\.layers\.1\.moe\.experts\.1 only 4 tokens of the 5"):
        table.require_coverage(5)


def test_hash_follows_content_not_order() -> None:
    table = RangeTable(2, {"a": 1.0, "b": 2.0}, {"m": [1, 2]})
    same = RangeTable(2, {"b": 2.0, "a": 1.0}, {"m": [1, 2]})
    assert table.sha256 == same.sha256
    assert table.sha256 != RangeTable(2, {"a": 1.0, "b": 2.5}, {"m": [1, 2]}).sha256
