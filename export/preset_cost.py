"""What a preset costs, on frames of its region: pinning, INT8 and both together, against the model with all experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from sonoedge.bundle import BundleWriter, HintCalibration
from sonoedge.export import recipe
from sonoedge.export.fidelity.given import RecordedCase, measure_recorded
from sonoedge.export.fidelity.measure import Variant, measure
from sonoedge.export.fidelity.preset import INT8, PINNING, TOGETHER, PinnedExperts, PinnedLayer
from sonoedge.export.fidelity.result import Fidelity
from sonoedge.export.fidelity_check import write_reports
from sonoedge.export.layerwise import final_hidden, head_logits
from sonoedge.export.layout import plan_layout
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import load_checkpoint, open_checkpoint
from sonoedge.export.packing import IGNORE
from sonoedge.export.preset import Pinned, PresetData, alone
from sonoedge.export.scheme import QuantizationPlan
from sonoedge.export.torch_session import TorchSession
from sonoedge.export.weights import Weights
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

REPORT = "preset"
REFERENCE = "float with all experts"
WAY_OUT = "keep more experts by [preset], give wider schemes, or lower the floor"


class Pinning(msgspec.Struct, frozen=True):
    """A preset on its way through a build."""

    original: Path  # the checkpoint with all experts
    config: ModelConfig  # its sizes
    pinned: Pinned
    data: PresetData

    def cost(
        self,
        checkpoint: Path,
        plan: QuantizationPlan,
        session: Session | None,
        hints: Mapping[str, HintCalibration],
        tokenizer: Tokenizer,
        spec: ImageSpec,
        context: int,
    ) -> Fidelity:
        """Measure what the pinned `checkpoint`, and `session` on its int8 graphs, lose; without one, pinning alone."""
        if session is None:
            found = measure_pinning(self.original, checkpoint, tokenizer, spec, context, self.data)
        else:
            found = measure_cost(self.original, checkpoint, session, hints, tokenizer, self.data)
        pinned_config = open_checkpoint(checkpoint)[0]
        chosen = PinnedExperts(
            region=self.data.region,
            method=self.data.settings.method,
            tokens=self.pinned.mixtures[0].use.tokens,
            layers=tuple(PinnedLayer.of(mixture, self.pinned.kept[mixture.name]) for mixture in self.pinned.mixtures),
            weights_bytes_before=plan_layout(self.config, plan).size,
            weights_bytes_after=plan_layout(pinned_config, plan).size,
            checkpoint_bytes_before=self.pinned.bytes_before,
            checkpoint_bytes_after=self.pinned.bytes_after,
        )
        return msgspec.structs.replace(found, reference=REFERENCE, preset=chosen)


def measure_cost(
    original: Path,
    pinned: Path,
    session: Session,
    hints: Mapping[str, HintCalibration],
    tokenizer: Tokenizer,
    data: PresetData,
) -> Fidelity:
    """Compare the session that will serve, and the pinned float model, with the `original` on the preset's cases.

    Both float models are in memory. Raises SonoEdgeError as `measure` does.
    """
    context = session.spec.context
    smaller = TorchSession(load_checkpoint(pinned), session.image, context)
    added = measure(smaller, {INT8: Variant(session, None, hints)}, tokenizer, data.cases)
    whole = TorchSession(load_checkpoint(original), session.image, context)
    found = measure(whole, {TOGETHER: Variant(session, None, hints), PINNING: Variant(smaller)}, tokenizer, data.cases)
    return msgspec.structs.replace(found, variants=found.variants | added.variants)


def measure_pinning(
    original: Path, pinned: Path, tokenizer: Tokenizer, spec: ImageSpec, context: int, data: PresetData
) -> Fidelity:
    """Compare the pinned float model alone with the `original`, on given answers, both read block by block."""
    batches = alone(data.held, tokenizer, spec, context)
    rows = [torch.nonzero(batch.packed.labels[0] != IGNORE).squeeze(1) for batch in batches]
    wanted, found = (final_hidden(checkpoint, batches, rows) for checkpoint in (original, pinned))
    weights = Weights(original)  # the head of both

    def cases() -> Iterator[RecordedCase]:
        for index, pair in enumerate(zip(wanted, found, strict=True)):  # logits of one frame at a time
            reference, variant = (logits.numpy() for logits in head_logits(weights, pair))
            yield RecordedCase(f"{data.region} {index}", reference, variant)

    return measure_recorded(PINNING, cases(), weights.config.image_token_id)


def floors_of(settings: recipe.Preset) -> recipe.Fidelity:
    """The preset's own floors, as a fidelity report is held against them."""
    return recipe.Fidelity(
        first_frame_seed=settings.first_frame_seed,
        frames=settings.compared_frames,
        least_answers=settings.least_answers,
        largest_kl=settings.largest_kl,
    )


def write_cost(found: Fidelity, data: PresetData, writer: BundleWriter, *, gated: bool) -> Fidelity:
    """Write `reports/preset.json` and `.html`; returns the report with the floors that it misses.

    gated: a build below a floor of [preset] fails, with a SonoEdgeError that names it.
    """
    floors = floors_of(data.settings)
    missed = write_reports(found, floors, data.cases, writer, gated=gated, name=REPORT, way_out=WAY_OUT)
    return msgspec.structs.replace(found, missed=missed)
