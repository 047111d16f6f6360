"""What a build decides before it writes a weight: ranges, smoothing, the scheme of every product, tuned weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.calibration.table import CalibrationTable
from sonoedge.device_profiles import Profile
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import is_random
from sonoedge.export.corpus import Batch, Batches, Corpus
from sonoedge.export.divergence import Divergence, evaluator
from sonoedge.export.layerwise import calibrate
from sonoedge.export.layout import EMBEDDING
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint, open_checkpoint, save_checkpoint
from sonoedge.export.qat import tune
from sonoedge.export.quantize import make_plan, quantized_share
from sonoedge.export.recipe import Qat, Recipe
from sonoedge.export.scheme import WIDER, CacheScheme, QuantizationPlan, Scheme
from sonoedge.export.sensitivity import Floor, Trace, blocks_of, search, weight_bytes_of
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

TABLE, FACTORS, TUNED, TUNING = "calibration.json", "smoothing.safetensors", "tuned", "tuning.json"
SIDES = {"row": "row_factors", "column": "column_factors"}


class Tuning(msgspec.Struct, frozen=True):
    """What quantization-aware distillation changed; divergences are from the float model."""

    before: Divergence
    after: Divergence
    helped: bool


class Quantized(msgspec.Struct, frozen=True):
    """All that decides the bytes of the weights file, and how it was found."""

    checkpoint: Path  # whose weights are written: the given one, or the tuned one
    plan: QuantizationPlan
    table: CalibrationTable
    smoothing: Smoothing  # still to be applied to the weights of `checkpoint`
    trace: Trace | None = None
    tuning: Tuning | None = None

    @property
    def quantized_share(self) -> float:
        """Fraction of the products whose weights are int8."""
        return quantized_share(self.plan)


def quantize(
    checkpoint: Path,
    recipe: Recipe,
    device: Profile,
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    work: Path,
    *,
    whole: bool,
) -> Quantized:
    """Calibrate, plan, search and tune as the recipe says; what is slow is kept in `work` and found there again.

    whole: the model fits in memory. Raises SonoEdgeError for a scheme that the device cannot run, for too little
    calibration, for a search or a tuning of a model that does not fit, and naming what a failed search misses.
    """
    config, _ = open_checkpoint(checkpoint)
    require_legal(recipe, device)
    for section, asked in (("search", recipe.search), ("qat", recipe.qat)):
        if asked is not None and not whole:
            raise SonoEdgeError(
                f"[{section}] needs the whole model in memory, which this machine lacks: leave the section out of the "
                "recipe, or build on a larger machine"
            )
    # What is wrong with the recipe is told before the slow part.
    make_plan(config, CalibrationTable.empty(), recipe.quantization)
    floor = Floor() if recipe.search is None else _floor(recipe)
    table, smoothing = _calibrated(checkpoint, recipe, corpus, tokenizer, spec, work)
    plan = make_plan(config, table, recipe.quantization)
    if recipe.search is None and recipe.qat is None:
        return Quantized(checkpoint, plan, table, smoothing)
    model = load_checkpoint(checkpoint)
    _smooth(model, smoothing)
    context = recipe.limits.context
    trace = None
    if recipe.search is not None:
        held = _held_batches(corpus, recipe.search.frames, tokenizer, spec, context)
        blocks = blocks_of(name for name in plan.schemes if name != EMBEDDING)
        plan, trace = search(
            evaluator(model, held),
            plan,
            blocks,
            weight_bytes_of(model),
            floor,
            recipe.search.memory_budget_bytes,
            ladder=legal_schemes(device),
        )
    tuning = None
    if recipe.qat is not None and (trace is None or not trace.met):  # a plan that holds its floor has nothing to gain
        tuning = _tuned(model, corpus, tokenizer, spec, plan, recipe.qat, context, work)
        if tuning.helped:
            return Quantized(work / TUNED, plan, table, Smoothing.none(), trace, tuning)
    if trace is not None and not trace.met and tuning is None:
        raise SonoEdgeError(
            f"the sensitivity search ends below the floor: {'; '.join(trace.missed)}: raise "
            "search.memory_budget_bytes, lower the floor in [fidelity], or add [qat]"
        )
    return Quantized(checkpoint, plan, table, smoothing, trace, tuning)


def _tuned(
    model: EchoVLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    plan: QuantizationPlan,
    settings: Qat,
    context: int,
    work: Path,
) -> Tuning:
    """Tune the model, or find that a halted build did; where it helped, the tuned checkpoint is in `work`."""
    noted = work / TUNING
    if noted.exists():  # written last, so the checkpoint is whole
        return msgspec.json.decode(noted.read_bytes(), type=Tuning)
    found = tune(model, corpus, tokenizer, spec, plan, settings, context=context)
    tuning = Tuning(found.before, found.after, found.helped)
    if found.helped:
        shutil.rmtree(work / TUNED, ignore_errors=True)
        save_checkpoint(found.model, work / TUNED)
    noted.write_bytes(msgspec.json.encode(tuning))
    return tuning


def legal_schemes(device: Profile) -> tuple[Scheme, ...]:
    """The schemes that a device's backend has, from narrow to wide: TensorRT has no int8 scale for each token."""
    return tuple(s for s in WIDER if device.backend == "onnxruntime" or s is not Scheme.W8A8_DYNAMIC)


def require_legal(recipe: Recipe, device: Profile) -> None:
    """Raise SonoEdgeError naming the recipe's key when its scheme is none that `device` can run."""
    legal = legal_schemes(device)
    settings = recipe.quantization
    asked = {"default": settings.default} | {f"schemes.{name!r}": scheme for name, scheme in settings.schemes.items()}
    for key, scheme in asked.items():
        if scheme not in legal:
            raise SonoEdgeError(
                f"quantization.{key} = {scheme.value!r}: {device.id} runs {device.backend}, which cannot: choose "
                f"{', '.join(other.value for other in legal)}"
            )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether any weight or activation of the bundle depends on what calibration measures."""
    settings = recipe.quantization
    fixed = Scheme.W8A8 in (settings.default, *settings.schemes.values())
    return fixed or recipe.calibration.smooth or settings.cache is CacheScheme.INT8


def _calibrated(
    checkpoint: Path, recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, work: Path
) -> tuple[CalibrationTable, Smoothing]:
    """The calibration, from `work` where an earlier build left it."""
    if not needs_calibration(recipe):
        return CalibrationTable.empty(), Smoothing.none()
    table_file, factors_file = work / TABLE, work / FACTORS
    if table_file.exists():  # written last, so the factors are whole
        with track("calibration of the halted build", None):
            table = msgspec.json.decode(table_file.read_bytes(), type=CalibrationTable)
            return table, _read_factors(factors_file)
    settings = recipe.calibration
    if is_random(checkpoint):  # its routers may leave an expert out for good, and no answer depends on it
        settings = msgspec.structs.replace(settings, least_expert_tokens=0)
    found = calibrate(checkpoint, corpus, tokenizer, spec, settings, recipe.limits.context)
    if is_random(checkpoint):
        _lend_ranges(found.table)
    _write_factors(found.smoothing, factors_file)
    partial = table_file.with_suffix(".partial")
    partial.write_bytes(found.table.encoded())
    partial.rename(table_file)
    return found.table, found.smoothing


def _lend_ranges(table: CalibrationTable) -> None:
    """Give experts that no token chose the widest range among their neighbours, so that benches can run them."""
    ranges = table.input_maximum
    for product, tokens in table.expert_tokens.items():
        names = [f"{product}.{expert}.down_proj" for expert in range(len(tokens))]
        widest = max(ranges.get(name, 0.0) for name in names)
        ranges |= {name: widest for name in names if name not in ranges}


def _write_factors(smoothing: Smoothing, path: Path) -> None:
    tensors = {
        f"{side} {key}": tensor.contiguous()
        for side, field in SIDES.items()
        for key, tensor in getattr(smoothing, field).items()
    }
    save_file(tensors, path)


def _read_factors(path: Path) -> Smoothing:
    sides: dict[str, dict[str, torch.Tensor]] = {side: {} for side in SIDES}
    for name, tensor in load_file(path).items():
        side, _, key = name.partition(" ")
        sides[side][key] = tensor
    return Smoothing(sides["row"], sides["column"])


@torch.no_grad()
def _smooth(model: EchoVLM, smoothing: Smoothing) -> None:
    """Fold the factors into a model in memory, in place."""
    for key, parameter in model.named_parameters():
        parameter.copy_(
            smoothing.apply(key, parameter.flatten(1) if parameter.dim() > 2 else parameter).view_as(parameter)
        )


def _floor(recipe: Recipe) -> Floor:
    """What the search aims at: the recipe's floors that it can measure on the torch model."""
    asked = recipe.fidelity
    floor = Floor() if asked is None else Floor(asked.largest_kl, asked.least_top1, asked.least_router)
    if floor == Floor():
        raise SonoEdgeError(
            "[search] has no floor to search for: give largest_kl, least_top1 or least_router in [fidelity]"
        )
    return floor


def _held_batches(corpus: Corpus, frames: int, tokenizer: Tokenizer, spec: ImageSpec, context: int) -> list[Batch]:
    """One batch a sample, the last samples of the corpus: calibration takes the first."""
    batches = Batches(corpus, tokenizer, spec, size=1, seed=0, context=context)
    count = min(frames, len(corpus))
    held = []
    for index in range(len(corpus) - count, len(corpus)):
        sample = corpus.sample(index, np.random.default_rng(index))
        held.append(batches.collate(tuple(image.grid for image in sample.images), [sample]))
    return held
