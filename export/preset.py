"""`build --preset REGION`: the region's own samples, and the checkpoint whose experts are pinned by their routing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from sonoedge.calibration.phantom import REGIONS
from sonoedge.calibration.pool import phantom_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export import recipe
from sonoedge.export.corpus import Batch, Batches, Corpus, PartOf, PhantomCorpus
from sonoedge.export.fidelity import cases as fidelity_cases
from sonoedge.export.fidelity.cases import Cases, ConversationCases, PhantomCases
from sonoedge.export.merging import merge_experts, require_small
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.pinning import choose_experts, write_pinned
from sonoedge.export.routing_survey import Mixture, survey_routing
from sonoedge.export.streamed_model import Passage, passage
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

CHECKPOINT, MERGED, NOTED = "pinned", "merged", "pinned.json"


class Preset(msgspec.Struct, frozen=True):
    """What is asked for: a region, and how its experts are chosen."""

    region: str
    settings: recipe.Preset


class PresetData(msgspec.Struct, frozen=True):
    """What a build for one region looks at; frames whose routing is measured are none of those that are compared."""

    region: str
    settings: recipe.Preset
    corpus: Corpus  # of the region: routing is measured on it
    elsewhere: Corpus | None  # of other regions, to lay beside it; None where the data holds none
    held: Corpus  # of the region: the cost is measured on it
    cases: Cases  # the same frames, as they are asked about


class Pinned(msgspec.Struct, frozen=True):
    """What a checkpoint with fewer experts was made by; it lies in the build's work folder as CHECKPOINT."""

    mixtures: tuple[Mixture, ...]  # routing in the model with all experts
    kept: dict[str, tuple[int, ...]]
    bytes_before: int  # of the weights in the checkpoint's own type
    bytes_after: int


def require_preset(region: str, settings: recipe.Recipe, config: ModelConfig) -> Preset:
    """The preset that a recipe makes of `region`.

    Raises SonoEdgeError for an unknown region, a recipe without [preset], a dense model, and experts that the model
    does not have or that cannot be merged.
    """
    if region not in REGIONS:
        raise SonoEdgeError(f"unknown preset {region!r}: choose {', '.join(REGIONS)}")
    if config.moe is None:
        raise SonoEdgeError(f"--preset {region} pins experts and a dense {config.architecture} has none: leave it out")
    asked = settings.preset
    if asked is None:
        raise SonoEdgeError(
            f"--preset {region} needs a [preset] section, which the recipe lacks: copy that of the recipe demo"
        )
    experts, total = asked.experts, config.moe.num_experts
    if experts is not None and experts > total:
        raise SonoEdgeError(f"preset.experts = {experts} and the model has {total} in a layer: ask for at most {total}")
    if asked.method == "merge" and experts is not None:
        require_small(config, experts)
    return Preset(region, asked)


def phantom_preset(folder: Path, preset: Preset, spec: ImageSpec) -> PresetData:
    """Phantoms of the region: some to measure routing on, others to compare on; and some of the other regions."""
    region, settings = preset.region, preset.settings
    first, frames = settings.first_frame_seed, settings.frames
    measured = phantom_pool(
        folder / "preset", frames, first_seed=first, spec=spec, region=region, label=f"render {region} phantoms"
    )
    mixed = PhantomCorpus(phantom_pool(folder / "regions", frames, first_seed=first, spec=spec), spec)
    held = phantom_pool(
        folder / "held",
        settings.compared_frames,
        first_seed=first + frames,
        spec=spec,
        region=region,
        label=f"render {region} phantoms to compare",
    )
    elsewhere = _picked(mixed, [index for index in range(len(mixed)) if mixed.region(index) != region])
    return PresetData(
        region, settings, PhantomCorpus(measured, spec), elsewhere, PhantomCorpus(held, spec), PhantomCases(held)
    )


def file_preset(path: Path, corpus: Corpus, preset: Preset) -> PresetData:
    """The cases of a conversation file that show the region, and some that show another.

    Raises SonoEdgeError when the file says no region, or holds fewer cases of this one than the recipe asks for.
    """
    region, settings = preset.region, preset.settings
    known = [corpus.region(index) for index in range(len(corpus))]
    held = [index for index, shown in enumerate(known) if shown == region]
    if not any(known):
        raise SonoEdgeError(
            f"{path} does not say which region its samples show, so none is known to be of {region}: give "
            'conversations whose cases have a key "region", or calibrate on phantoms'
        )
    wanted = settings.frames + settings.compared_frames
    if len(held) < wanted:
        others = sorted({shown for shown in known if shown is not None} - {region})
        raise SonoEdgeError(
            f"preset.frames and preset.compared_frames ask for {wanted} cases of {region} and {path} holds {len(held)}"
            f"{' beside ' + ', '.join(others) if others else ''}: give more of them, or ask for fewer"
        )
    # Evenly mixed: sorted files begin with cases that are all alike.
    order = [held[index] for index in np.random.default_rng(0).permutation(len(held))]
    measured, compared = sorted(order[: settings.frames]), sorted(order[settings.frames : wanted])
    elsewhere = [index for index, shown in enumerate(known) if shown not in (None, region)]
    elsewhere = elsewhere[:: max(1, len(elsewhere) // settings.frames)][: settings.frames]
    return PresetData(
        region,
        settings,
        PartOf(corpus, measured),
        _picked(corpus, elsewhere),
        PartOf(corpus, compared),
        fidelity_cases.PartOf(ConversationCases(path), compared),
    )


def pin_experts(
    checkpoint: Path, data: PresetData, tokenizer: Tokenizer, spec: ImageSpec, context: int, work: Path
) -> Pinned:
    """Measure the region's routing and write the smaller checkpoint into `work`, or find that a halted build did."""
    noted = work / NOTED
    if noted.exists():  # written last, so the checkpoint is whole
        return msgspec.json.decode(noted.read_bytes(), type=Pinned)
    config, headers = open_checkpoint(checkpoint)
    of_region = alone(data.corpus, tokenizer, spec, context)
    passages = [passage(batch, data.region) for batch in of_region]
    if data.elsewhere is not None:
        passages += [passage(batch) for batch in alone(data.elsewhere, tokenizer, spec, context)]
    mixtures = survey_routing(checkpoint, passages, data.region)
    settings = data.settings
    kept = choose_experts(mixtures, experts=settings.experts, mass=settings.mass)
    replaced = {}
    fewer = any(len(kept[mixture.name]) < len(mixture.use.mass) for mixture in mixtures)
    if settings.method == "merge" and fewer:  # with all experts there is nothing to take over
        require_small(config, len(kept[mixtures[0].name]))
        again: list[Passage] = [passage(batch, data.region) for batch in of_region]
        replaced = merge_experts(checkpoint, again, kept, work / MERGED)
    size = write_pinned(checkpoint, kept, work / CHECKPOINT, replaced)
    shutil.rmtree(work / MERGED, ignore_errors=True)
    pinned = Pinned(mixtures, kept, sum(header.bytes for header in headers.values()), size)
    partial = noted.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(pinned))
    partial.rename(noted)
    return pinned


def _picked(corpus: Corpus, indices: Sequence[int]) -> Corpus | None:
    return PartOf(corpus, indices) if indices else None


def alone(corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, context: int) -> list[Batch]:
    """Every sample with its questions and answers, alone."""
    batches = Batches(corpus, tokenizer, spec, size=1, seed=0, context=context)
    made = []
    for index in range(len(corpus)):
        sample = corpus.sample(index, np.random.default_rng(index))
        made.append(batches.collate(tuple(image.grid for image in sample.images), [sample]))
    return made
