"""One layer of the released EchoVLM at its full width, with random weights, is built and looked into."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from sonoedge.bundle import DecoderSpec
from sonoedge.engine_manifest import Bucket
from sonoedge.export.engines.buckets import cache_tokens, decoder_extents
from sonoedge.export.engines.builder import Target, build_engine
from sonoedge.export.engines.library import DECODE_ROWS
from sonoedge.export.graphs import export_decoder
from sonoedge.export.layout import EMBEDDING, Layout, plan_layout
from sonoedge.export.lowering import lowered
from sonoedge.export.make_checkpoint import named_config
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.passes.products import Purpose
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import QuantizationPlan, Scheme

VOCAB, CONTEXT = 4096, 256
PRODUCTS = 4 + 3 + 4 * 2 + 3 + 1  # attention, dense, experts (gate and up are one), shared, head
FLOAT_PRODUCTS = 3  # router, gate of the shared expert, blend


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """The released model with one layer and fewer words."""
    released = named_config("echovlm-7b")
    ids = {"image_token_id": 4095, "video_token_id": 4094, "vision_start_token_id": 4093, "vision_end_token_id": 4092}
    vision = msgspec.structs.replace(released.vision, depth=1)
    config = msgspec.structs.replace(
        released, num_hidden_layers=1, vocab_size=VOCAB, bos_token_id=1, eos_token_ids=(2,), vision=vision, **ids
    )
    assert config.moe is not None
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    assert widths == (3584, 18944, 28, 4)
    assert (config.moe.moe_intermediate_size, config.moe.shared_expert_intermediate_size) == (1408, 5632)
    return config


@pytest.fixture(scope="module")
def exported(config: ModelConfig) -> ir.Model:
    """Its decoder before any pass."""
    return export_decoder(config, CONTEXT)


def write_graph(config: ModelConfig, exported: ir.Model, scheme: Scheme, folder: Path) -> tuple[Path, int]:
    """The decoder for TensorRT with all products in one scheme, over a file of random weights; and their bytes."""
    names = product_names(config)
    largest = dict.fromkeys(names, 8.0)
    assert config.moe is not None
    largest |= {f"model.layers.0.moe.experts.{n}.down_proj": 4.0 for n in range(config.moe.num_experts)}
    plan = QuantizationPlan({**dict.fromkeys(names, scheme), EMBEDDING: Scheme.W8A16}, largest)
    layout = plan_layout(config, plan)
    write_random(layout, folder / "model.weights")
    path = folder / "decoder.onnx"
    ir.save(lowered(exported, config, plan, layout, folder / "model.weights", Purpose.TENSORRT), path)
    parts = [part for unit in layout.units for part in unit.parts if not part.name.startswith("visual.")]
    return path, sum(part.length for part in parts)


def write_random(layout: Layout, path: Path) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for part in (part for unit in layout.units for part in unit.parts):
            file.seek(part.offset)
            if part.dtype == "int8":
                file.write(rng.bytes(part.length))
            else:
                file.write(np.full(part.length // 4, 0.002, np.float32).tobytes())


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A16])
def test_a_layer_of_full_width_keeps_its_weights_in_int8_and_once(
    scheme: Scheme, config: ModelConfig, exported: ir.Model, target: Target, tmp_path: Path
) -> None:
    spec = DecoderSpec(
        hidden=config.hidden_size,
        layers=1,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=VOCAB,
        context=CONTEXT,
        image_token_id=config.image_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    buckets = tuple(Bucket(rows, CONTEXT, rows, rows) for rows in (64, DECODE_ROWS["tensorrt_rtx"]))
    graph, weights = write_graph(config, exported, scheme, tmp_path)
    built = build_engine(
        target, graph, tmp_path / "decoder.plan", decoder_extents(buckets, spec, cache_tokens(CONTEXT, buckets))
    )
    kept = {Scheme.W8A8: built.products.int8, Scheme.W8A16: built.products.int8_weights}
    assert kept[scheme] == PRODUCTS
    assert built.products.float == FLOAT_PRODUCTS
    assert built.products.not_int8 == built.products.unpacked == ()
    assert built.bytes < weights + 16e6  # a weight stored twice, or as float, would be far more
