"""What is planned for, read without any weight: from a checkpoint and the recipe of its build, or from a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import onnx_ir as ir

from sonoedge.calibration.table import CalibrationTable
from sonoedge.device_profiles.memory_plan import Use
from sonoedge.device_profiles.planning import Model
from sonoedge.device_profiles.schema import Profile
from sonoedge.device_profiles.shape import Experts, ModelShape, VisionShape, Weights
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.layout import EMBEDDING, Layout, plan_layout
from sonoedge.export.markers import LM_HEAD
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.quantize import make_plan
from sonoedge.export.quantizing import require_legal
from sonoedge.export.recipe import Recipe
from sonoedge.export.scheme import CacheScheme, Scheme
from sonoedge.manifest import HINT_SCHEMA_FILE, MANIFEST_FILE, TOKENIZER_FILE, ImageSpec, Manifest, decode_manifest
from sonoedge.runtime.hint_layout import lay_out
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.prompt import HINT_LANGUAGE, prefix_ids, question_ids
from sonoedge.runtime.tokens import Tokenizer

QUESTION = "Is a lesion visible?"
INT8_PRODUCTS = (Scheme.W8A8, Scheme.W8A8_DYNAMIC)


class _Matrix(msgspec.Struct, frozen=True):
    """One initializer of a bundle's graph that lies in the weights file."""

    shape: tuple[int, ...]
    bytes: int


def checkpoint_model(path: Path, recipe: Recipe, profile: Profile) -> Model:
    """The model that `sonoedge build` would make of a checkpoint; raises SonoEdgeError as the build would."""
    config, _ = open_checkpoint(path)
    require_legal(recipe, profile)
    settings, spec = recipe.quantization, image_spec(path)
    plan = make_plan(config, CalibrationTable.empty(), settings)
    tokenizer = open_tokenizer(path, config) if (path / TOKENIZER_FILE).exists() else None
    use = Use(
        context=recipe.limits.context,
        image_tokens=_image_tokens(spec),
        int8_products=_mostly_int8(plan.schemes),
        int8_cache=settings.cache is CacheScheme.INT8,
        # An engine serves many tokens and one from the same weights; ONNX Runtime lays them out for each.
        one_token_form=settings.graphs == "speed" and profile.backend == "onnxruntime",
    )
    name, shape = path.resolve().name, shape_of(config)
    return Model(name, shape, _weights_of(plan_layout(config, plan)), _with_prompts(use, tokenizer, None))


def bundle_model(path: Path, profile: Profile) -> Model:
    """The model of a bundle, by its manifest and graphs; nothing is hashed, `sonoedge verify` does that."""
    try:
        manifest = decode_manifest((path / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise SonoEdgeError(
            f"{path / MANIFEST_FILE} cannot be read ({error.strerror}): copy the bundle again"
        ) from error
    graphs = {graph.purpose: ir.load(path / graph.path) for graph in manifest.graphs if graph.formulation == "qdq"}
    if {"vision", "decoder"} - graphs.keys():
        raise SonoEdgeError(f"{path} has no portable graphs to plan from: build the bundle again")
    decoder = graphs["decoder"].graph
    matrices = {
        value.name: _Matrix(value.shape.numpy(), value.const_value.nbytes)
        for model in graphs.values()
        for value in model.graph.initializers.values()
        if value.name is not None and value.shape is not None and isinstance(value.const_value, ir.ExternalTensor)
    }
    one_token = any(graph.purpose == "decode" and graph.formulation == "ort" for graph in manifest.graphs)
    caches = [value for value in decoder.inputs if (value.name or "").startswith("past_")]
    int8_cache = any(value.dtype is ir.DataType.INT8 for value in caches)
    quantized = sum(node.op_type == "QuantizeLinear" for node in graphs["decoder"].graph)
    use = Use(
        context=manifest.decoder.context,
        image_tokens=_image_tokens(manifest.image),
        int8_products=quantized > (len(caches) if int8_cache else 0),
        int8_cache=int8_cache,
        one_token_form=one_token and profile.backend == "onnxruntime",
    )
    tokenizer = Tokenizer.from_file(path / TOKENIZER_FILE)
    return Model(
        manifest.model.name,
        _shape_in(matrices, manifest, _vision_head_dim(graphs["vision"]), path),
        _weights_in(matrices),
        _with_prompts(use, tokenizer, path / HINT_SCHEMA_FILE),
    )


def shape_of(config: ModelConfig) -> ModelShape:
    """The sizes of a checkpoint."""
    moe, vision = config.moe, config.vision
    experts = None
    if moe is not None:
        experts = Experts(
            moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size, moe.shared_expert_intermediate_size
        )
    return ModelShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dense_width=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        experts=experts,
        vision=VisionShape(
            layers=vision.depth,
            width=vision.embed_dim,
            heads=vision.num_heads,
            mlp_width=vision.mlp_size,
            patch_values=vision.patch_values,
            merge=vision.spatial_merge_size,
            gated=vision.windows is not None,
        ),
    )


def _weights_of(layout: Layout) -> Weights:
    tensors = {stored.name: _Matrix(stored.shape, stored.length) for unit in layout.units for stored in unit.parts}
    return _weights_in(tensors)


def _weights_in(matrices: Mapping[str, _Matrix]) -> Weights:
    """Bytes by what reads them, from every tensor of the weights file."""
    sizes = dict.fromkeys(("vision", "embeddings", "layers", "experts", "head"), 0)
    for name, matrix in matrices.items():
        sizes[_part(name)] += matrix.bytes
    tied = not sizes["head"]
    return Weights(
        vision=sizes["vision"],
        embeddings=sizes["embeddings"],
        layers=sizes["layers"],
        experts=sizes["experts"],
        head=sizes["embeddings"] if tied else sizes["head"],
        tied=tied,
        largest_matrix=max(math.prod(matrix.shape[-2:]) for matrix in matrices.values()),
    )


def _part(name: str) -> str:
    if name.startswith("visual."):
        return "vision"
    if name.startswith(EMBEDDING):
        return "embeddings"
    if name.startswith(LM_HEAD):
        return "head"
    return "experts" if ".moe.experts." in name else "layers"


def _vision_head_dim(model: ir.Model) -> int:
    """Each frequency of the rotary embedding turns a pair of values by row, and one by column."""
    shape = model.graph.initializers["frequency"].shape
    assert shape is not None  # initializers have one
    return 4 * shape.numpy()[0]


def _shape_in(matrices: Mapping[str, _Matrix], manifest: Manifest, vision_head_dim: int, path: Path) -> ModelShape:
    """The sizes of a bundle's model, from the shapes of its weights."""
    spec, image = manifest.decoder, manifest.image

    def size(key: str, axis: int = 0) -> int:
        """Rows (0) or columns (1) of the weight of `key`, whatever its format; 0 where the model has none."""
        names = (f"{key}.weight", f"{key}.weight_int8", f"{key}.weight_int8_block")
        return next((matrices[name].shape[axis] for name in names if name in matrices), 0)

    experts, routed = manifest.experts, any(".moe.experts." in name for name in matrices)
    if routed and experts is None:
        raise SonoEdgeError(f"{path / MANIFEST_FILE} does not say how experts are chosen: build the bundle again")
    blocks = [name for name in matrices if name.startswith("visual.blocks.") and ".attn.proj.weight" in name]
    first = min(int(name.split(".")[2]) for name in blocks)
    width = size(f"visual.blocks.{first}.attn.proj")
    gated = size(f"visual.blocks.{first}.mlp.gate_proj")
    shared = size("model.layers.0.moe.shared_expert.gate_proj")
    return ModelShape(
        hidden=spec.hidden,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dense_width=size("model.layers.0.mlp.gate_proj"),
        vocab=spec.vocab,
        tied=not any(name.startswith(LM_HEAD) for name in matrices),
        experts=None if experts is None else Experts(experts.experts, experts.chosen, experts.inner, shared),
        vision=VisionShape(
            layers=len({name.split(".")[2] for name in blocks}),
            width=width,
            heads=width // vision_head_dim,
            mlp_width=gated or size(f"visual.blocks.{first}.mlp.fc1"),
            patch_values=size("visual.patch_embed.proj", axis=1),
            merge=image.merge_size,
            gated=bool(gated),
        ),
    )


def _with_prompts(use: Use, tokenizer: Tokenizer | None, schema: Path | None) -> Use:
    """The lengths of what the runtime asks about one frame; unknown without a tokenizer."""
    if tokenizer is None:
        return use
    layout = lay_out(load_schema(schema), tokenizer, HINT_LANGUAGE)
    return msgspec.structs.replace(
        use,
        prefix_tokens=len(prefix_ids(tokenizer, [use.image_tokens], HINT_LANGUAGE)),
        question_tokens=len(question_ids(tokenizer, QUESTION)),
        hint_tokens=len(layout.ids),
        hint_rows=len(layout.rows),
    )


def _image_tokens(spec: ImageSpec) -> int:
    return max(1, spec.max_pixels // (spec.patch_size * spec.merge_size) ** 2)


def _mostly_int8(schemes: Mapping[str, Scheme]) -> bool:
    products = [scheme for name, scheme in schemes.items() if name != EMBEDDING]
    return 2 * sum(scheme in INT8_PRODUCTS for scheme in products) > len(products)
