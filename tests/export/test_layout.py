"""The weights file's layout: every weight of the checkpoint once, apart, aligned, experts side by side."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.layout import (
    ALIGNMENT,
    BYTES,
    EMBEDDING,
    Layout,
    Stored,
    expert_name,
    int8_name,
    plan_layout,
    product_key,
    scale_name,
)
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import empty_model
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import QuantizationPlan, Scheme


def plan_of(config: ModelConfig, scheme: Scheme, **others: Scheme) -> QuantizationPlan:
    schemes = dict.fromkeys(product_names(config), scheme)
    for name in schemes:
        schemes[name] = next((other for part, other in others.items() if part in name), scheme)
    return QuantizationPlan({EMBEDDING: Scheme.FLOAT} | schemes, {})


def written(layout: Layout) -> list[Stored]:
    return [part for unit in layout.units for part in unit.parts]


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_lies_once_aligned_and_apart(small_config: ModelConfig, scheme: Scheme, tied: bool) -> None:
    config = msgspec.structs.replace(small_config, tie_word_embeddings=tied)
    layout = plan_layout(config, plan_of(config, scheme))
    keys = Counter(key for unit in layout.units for key in unit.keys)
    state = {key: tuple(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}
    twice = {f"{EMBEDDING}.weight"} if tied and scheme is not Scheme.FLOAT else set()  # float rows, and the int8 head
    assert keys == Counter(list(state) + sorted(twice))
    parts = sorted(written(layout), key=lambda part: part.offset)
    assert len({part.name for part in parts}) == len(parts)
    for part, following in itertools.pairwise(parts):
        assert part.offset + part.length <= following.offset
    assert parts[-1].offset + parts[-1].length == layout.size
    assert layout.weight_bytes() == sum(part.length for part in parts)
    assert layout.size - layout.weight_bytes() < ALIGNMENT * len(parts)
    for name, stored in layout.tensors.items():
        assert stored.name == name
        if ".moe.experts." not in name:
            assert stored.offset % ALIGNMENT == 0
    for unit in layout.units:
        values = sum(math.prod(state[key]) for key in unit.keys)
        assert unit.values.length == values * BYTES[unit.values.dtype]
        assert (unit.scale is None) == (unit.values.dtype == "float32")
        assert all(layout.tensors[part.name] == part for part in unit.parts)
        if unit.scale is not None:
            rows, columns = unit.values.shape
            assert unit.block == scheme.block
            assert unit.scale.shape == ((rows,) if scheme.block is None else (rows, -(-columns // 128)))


@pytest.mark.parametrize("scheme", Scheme)
def test_experts_of_a_layer_are_one_tensor_too(small_config: ModelConfig, scheme: Scheme) -> None:
    layout = plan_layout(small_config, plan_of(small_config, scheme))
    hidden, inner, count = 48, 20, 5
    name = "model.layers.1.moe.experts"
    for part, shape in (("gate_up", (2 * inner, hidden)), ("down", (hidden, inner))):
        whole = layout.tensors[f"{name}.{part}_values"]
        assert whole.shape == (count, *shape)
        assert whole.offset % ALIGNMENT == 0
        each = whole.length // count
        for expert in range(count):
            view = layout.tensors[expert_name(name, expert, part, "values")]
            assert (view.shape, view.dtype, view.offset) == (shape, whole.dtype, whole.offset + expert * each)
            (unit,) = (unit for unit in layout.units if unit.values == view)
            projections = ["gate_proj", "up_proj"] if part == "gate_up" else ["down_proj"]
            assert list(unit.keys) == [f"{name}.{expert}.{projection}.weight" for projection in projections]
        if scheme is not Scheme.FLOAT:
            scales = layout.tensors[f"{name}.{part}_scale"]
            assert scales.shape[:2] == (count, shape[0])
            assert (
                layout.tensors[expert_name(name, 2, part, "scale")].offset == scales.offset + 2 * scales.length // count
            )


def test_schemes_may_differ_and_norms_stay_float(small_config: ModelConfig) -> None:
    layout = plan_layout(small_config, plan_of(small_config, Scheme.W8A8, fc1=Scheme.FLOAT, o_proj=Scheme.W8A16_BLOCK))
    names = set(layout.tensors)
    assert {"visual.blocks.0.mlp.fc1.weight", "visual.blocks.0.mlp.fc2.weight_int8"} <= names
    attention = "model.layers.1.self_attn"
    assert {f"{attention}.o_proj.weight_int8_block", f"{attention}.o_proj.weight_scale_block"} <= names
    assert int8_name("k", Scheme.W8A8) == int8_name("k", Scheme.W8A16) != int8_name("k", Scheme.W8A16_BLOCK)
    assert scale_name("k", Scheme.W8A8) == scale_name("k", Scheme.W8A16) != scale_name("k", Scheme.W8A16_BLOCK)
    never = ("norm", "moe.gate.", "shared_expert_gate", "coefficient", ".bias")
    assert all(unit.scale is None for unit in layout.units if any(word in unit.values.name for word in never))


def test_convolutions_are_the_matrix_that_they_stand_for(small_config: ModelConfig) -> None:
    layout = plan_layout(small_config, plan_of(small_config, Scheme.FLOAT))
    assert layout.tensors["visual.patch_embed.proj.weight"].shape == (32, 1176)


def test_tied_embeddings_and_head_share_what_they_can(small_config: ModelConfig) -> None:
    """One int8 tensor serves both; a head in blocks needs one of its own, and float rows are not stored twice."""
    config = msgspec.structs.replace(small_config, tie_word_embeddings=True)
    key = product_key("lm_head", config)
    assert key == f"{EMBEDDING}.weight"
    assert product_key("lm_head", small_config) == "lm_head.weight"

    def stored(head: Scheme, rows: Scheme) -> list[str]:
        plan = plan_of(config, head)
        plan = msgspec.structs.replace(plan, schemes={**plan.schemes, EMBEDDING: rows})
        return sorted(p.name.removeprefix(key) for p in written(plan_layout(config, plan)) if p.name.startswith(key))

    assert stored(Scheme.W8A8, Scheme.W8A16) == ["_int8", "_scale"]
    assert stored(Scheme.FLOAT, Scheme.FLOAT) == [""]
    assert stored(Scheme.W8A16, Scheme.FLOAT) == ["", "_int8", "_scale"]
    assert stored(Scheme.W8A16_BLOCK, Scheme.W8A16) == ["_int8", "_int8_block", "_scale", "_scale_block"]


def test_embeddings_in_blocks_are_refused(small_config: ModelConfig) -> None:
    plan = plan_of(small_config, Scheme.W8A8)
    plan = msgspec.structs.replace(plan, schemes={**plan.schemes, EMBEDDING: Scheme.W8A16_BLOCK})
    with pytest.raises(SonoEdgeError, match=r"quantization.schemes gives model.embed_tokens 'w8a16-block128'"):
        plan_layout(small_config, plan)


def test_the_same_plan_gives_the_same_layout(small_config: ModelConfig) -> None:
    layouts: list[Any] = [plan_layout(small_config, plan_of(small_config, Scheme.W8A8)) for _ in range(2)]
    assert msgspec.json.encode(layouts[0]) == msgspec.json.encode(layouts[1])
