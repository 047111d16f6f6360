"""`sonoedge build`: a checkpoint becomes a bundle: calibrated, quantized, exported, compared with the float model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import onnxruntime

from sonoedge.bundle import (
    HINT_SCHEMA_FILE,
    TOKENIZER_FILE,
    BundleWriter,
    Contents,
    Golden,
    Hashes,
    HintCalibration,
    Manifest,
    Model,
)
from sonoedge.calibration.confidence import expected_calibration_error, fit
from sonoedge.calibration.known import fit_familiarity
from sonoedge.calibration.pool import PhantomPool, phantom_pool
from sonoedge.calibration.scores import score_pool
from sonoedge.device_profiles import load_profile
from sonoedge.errors import SonoEdgeError
from sonoedge.export.bundle_graphs import DECODER_ORT, VISION, write_graphs
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import Batches, Corpus, open_corpus
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.quantize import calibrate, plan, quantized_share
from sonoedge.export.recipe import Recipe, load_recipe
from sonoedge.export.torch_session import TorchSession, decoder_spec
from sonoedge.runtime import hints
from sonoedge.runtime.golden import GoldenCase
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.prompt import SYSTEM
from sonoedge.runtime.sessions.ort import OrtSession
from sonoedge.runtime.tokens import Tokenizer

INTENDED_USE = (
    "Research and engineering only. Not a medical device; not for diagnosis or treatment decisions. "
    "Hints are statements of a statistical model about one frame and need a qualified reader."
)
TOOLCHAIN = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
LEAST_GOLDEN_BOUND = 0.02  # float32 sums in another order on another chip stay far below it, a broken kernel far above
GOLDEN_MARGIN = 2.0


class Built(msgspec.Struct, frozen=True):
    """What a build measured on the way."""

    manifest: Manifest
    quantized_share: float
    golden_error: float
    calibration_error: dict[str, float]


def build_bundle(
    model: EchoVLM, tokenizer_file: Path, spec: ImageSpec, recipe: Recipe, profile: str, corpus: Corpus, out: Path, *,
    name: str, random: bool = False, known: PhantomPool | None = None,
) -> Built:  # fmt: skip
    """Write the bundle `out`; `known` are frames that hints are made trustworthy on (None: hints stay uncalibrated).

    Raises SonoEdgeError for anything that cannot be built; nothing is then left at `out`.
    """
    device = load_profile(profile)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    context = recipe.limits.context
    decoder = decoder_spec(model.config, context)
    with BundleWriter(out) as writer:
        table = calibrate(model, corpus, tokenizer, spec, frames=recipe.calibration.frames, context=context)
        table.require_coverage(recipe.calibration.least_expert_tokens)
        chosen = plan(model, table, recipe.quantization)
        graphs, stages = write_graphs(model, chosen, context, writer)
        writer.add("calibration.json").write_bytes(msgspec.json.format(msgspec.json.encode(table)))
        shutil.copyfile(tokenizer_file, writer.add(TOKENIZER_FILE))
        schema_file = Path(hints.__file__).parent / HINT_SCHEMA_FILE
        shutil.copyfile(schema_file, writer.add(HINT_SCHEMA_FILE))
        session = OrtSession(writer.add(VISION), writer.add(DECODER_ORT), spec, decoder, threads=2)
        error = _write_golden(model, session, corpus, tokenizer, spec, recipe, writer)
        calibration: dict[str, HintCalibration] = {}
        trust: dict[str, float] = {}
        familiarity = None
        if known is not None:
            scored = score_pool(session, tokenizer, known, "calibrate confidence")
            calibration = {hint: fit(scores, recipe.hints.least_accuracy) for hint, scores in scored.hints.items()}
            trust = {h: expected_calibration_error(s, calibration[h].temperature) for h, s in scored.hints.items()}
            familiarity = "familiarity.npz"
            fit_familiarity(scored.mean_embeds, recipe.hints.known_share).save(writer.add(familiarity))
        session.close()
        prompt = hashlib.sha256(schema_file.read_bytes() + msgspec.json.encode(SYSTEM, order="sorted")).hexdigest()
        manifest = writer.commit(
            Contents(
                model=Model(name, model.config.architecture, sum(p.numel() for p in model.parameters()), random),
                hashes=Hashes(recipe=recipe.sha256, calibration=table.sha256, prompt=prompt),
                toolchain=toolchain(),
                profile=device.id,
                intended_use=INTENDED_USE,
                image=spec,
                decoder=decoder,
                graphs=graphs,
                golden=Golden("golden", max(LEAST_GOLDEN_BOUND, round(GOLDEN_MARGIN * error, 4))),
                stages=stages,
                hint_calibration=calibration,
                familiarity=familiarity,
            )
        )
    return Built(manifest, quantized_share(chosen), error, trust)


def _write_golden(
    model: EchoVLM,
    session: OrtSession,
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    recipe: Recipe,
    writer: BundleWriter,
) -> float:
    """Record what the float model makes of a few samples, and return how far the built graphs are from it.

    Raises SonoEdgeError when the built graphs give numbers that are not finite.
    """
    reference = TorchSession(model, spec, recipe.limits.context)
    batches = Batches(corpus, tokenizer, spec, size=1, seed=1, context=recipe.limits.context)
    worst = 0.0
    for index in range(min(recipe.limits.golden_cases, len(corpus))):
        sample = corpus.sample(index, np.random.default_rng(index))
        image = sample.images[0]
        asked = msgspec.structs.replace(sample, images=(image,), branches=sample.branches[:1])
        packed = batches.collate((image.grid,), [asked]).packed
        ids, positions = packed.input_ids[0].numpy(), packed.positions[:, 0].numpy()
        embeds = reference.encode_image(image)
        reference.rewind(0)
        logits = reference.extend(ids, positions, image_embeds=embeds, logits_rows=np.arange(len(ids)))
        case = GoldenCase(image.values, np.asarray(image.grid, np.int64), ids, positions, logits)
        case.save(writer.add(f"golden/{index}.npz"))
        error = case.error(session)
        if not math.isfinite(error):
            raise SonoEdgeError(
                f"golden/{index}: the built graphs give numbers that are not finite: keep more products float in "
                "the recipe"
            )
        worst = max(worst, error)
    return worst


def run(checkpoint: Path, profile: str, recipe: str | None, calibration: str, out: Path, as_json: bool) -> None:
    """The verb: build CHECKPOINT into the bundle OUT for a device profile."""
    settings = load_recipe(recipe)
    load_profile(profile)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SonoEdgeError(f"{out} exists: remove it, or choose another --out")
    model = load_checkpoint(checkpoint)
    spec = image_spec(checkpoint)
    open_tokenizer(checkpoint, model.config)  # refused now, not after minutes of rendering
    with TemporaryDirectory(prefix="sonoedge-") as work:
        known = None
        pool = None
        if calibration == "phantoms":
            pool = calibration_pool(Path(work), spec, settings)
            known = confidence_pool(Path(work), spec, settings)
        corpus = open_corpus(calibration, spec, pool)
        built = build_bundle(
            model,
            checkpoint / TOKENIZER_FILE,
            spec,
            settings,
            profile,
            corpus,
            out,
            name=checkpoint.resolve().name,
            known=known,
        )
    report(out, built, as_json)


def toolchain() -> dict[str, str]:
    """The versions of what a build goes through; onnxruntime may be installed under its GPU distribution's name."""
    return {package: importlib.metadata.version(package) for package in TOOLCHAIN} | {
        "onnxruntime": onnxruntime.__version__
    }


def calibration_pool(folder: Path, spec: ImageSpec, recipe: Recipe) -> PhantomPool:
    """The phantoms that give activation ranges."""
    settings = recipe.calibration
    label = "render calibration phantoms"
    return phantom_pool(folder, settings.frames, first_seed=settings.first_frame_seed, spec=spec, label=label)


def confidence_pool(folder: Path, spec: ImageSpec, recipe: Recipe) -> PhantomPool:
    """The phantoms that hints are made trustworthy on."""
    settings = recipe.hints
    label = "render confidence phantoms"
    return phantom_pool(folder, settings.frames, first_seed=settings.first_frame_seed, spec=spec, label=label)


def report(out: Path, built: Built, as_json: bool) -> None:
    """Say what was built."""
    manifest = built.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        print(
            msgspec.json.encode(
                {
                    "bundle": str(out),
                    "model": manifest.model.id,
                    "bytes": size,
                    "quantized_share": built.quantized_share,
                    "golden_error": built.golden_error,
                    "golden_bound": manifest.golden.bound,
                    "calibration_error": built.calibration_error,
                }
            ).decode()
        )
        return
    print(f"{out}: {size / 1e6:.1f} MB, model {manifest.model.id[:12]}, profile {manifest.profile}")
    share, error = built.quantized_share, built.golden_error
    print(f"{share:.0%} of the products in int8; logits differ from the float model's by {error:.1%}")
    for hint, calibration in manifest.hint_calibration.items():
        print(
            f"  {hint}: temperature {calibration.temperature:.2f}, silent below {calibration.abstain_below:.2f}, "
            f"calibration error {built.calibration_error[hint]:.3f}"
        )
