"""From a float model and calibration samples to a plan that gives every product its scheme and its input range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from sonoedge.calibration.ranges import RangeTable, observe
from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batches, Corpus
from sonoedge.export.lowering import QuantizationPlan, Scheme
from sonoedge.export.markers import is_product
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.vision import PatchEmbed
from sonoedge.export.recipe import Quantization
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer


def products(model: EchoVLM) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules whose first argument is a quantizable product's input, and the mixtures, by the names in graphs."""
    linears: dict[str, nn.Module] = {}
    mixtures: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PatchEmbed):
            linears[f"{name}.proj"] = module
        elif isinstance(module, SparseMoE):
            mixtures[f"{name}.experts"] = module
        elif is_product(name, module):
            linears[name] = module
    return linears, mixtures


def calibrate(
    model: EchoVLM, corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, *, frames: int, context: int
) -> RangeTable:
    """Run `frames` samples with their questions and answers through the float model and note every range.

    Raises SonoEdgeError when the corpus holds fewer frames, and naming the product whose activations are not finite.
    """
    if len(corpus) < frames:
        raise SonoEdgeError(
            f"calibration.frames = {frames} and the data holds {len(corpus)}: give more data, or ask for fewer frames"
        )
    batches = Batches(corpus, tokenizer, spec, size=1, seed=0, context=context)
    linears, mixtures = products(model)
    with observe(linears, {"lm_head": model.model.norm}, mixtures) as table, track("calibrate", frames) as advance:
        for index in range(frames):
            sample = corpus.sample(index, np.random.default_rng(index))
            batch = batches.collate(tuple(image.grid for image in sample.images), [sample])
            embeds = model.encode_images(batch.patches, batch.grids)
            packed = batch.packed
            model(packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=packed.attention_bias)
            advance(1)
        table.frames = frames
    return table


def plan(model: EchoVLM, table: RangeTable, settings: Quantization) -> QuantizationPlan:
    """Give every product of the model its scheme; raises SonoEdgeError for a recipe entry that names no product."""
    linears, mixtures = products(model)
    names: Sequence[str] = [*linears, *mixtures, "lm_head"]
    for prefix in settings.float:
        if not any(name.startswith(prefix) for name in names):
            raise SonoEdgeError(
                f"quantization.float names {prefix!r}, with which no product begins: write names such as {names[0]!r}"
            )
    return QuantizationPlan({name: settings.scheme(name) for name in names}, table.input_maximum)


def quantized_share(plan: QuantizationPlan) -> float:
    """Fraction of the products that are computed in int8."""
    return sum(scheme is not Scheme.FLOAT for scheme in plan.schemes.values()) / len(plan.schemes)
