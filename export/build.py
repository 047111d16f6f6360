"""`sonoedge build`: a checkpoint becomes a bundle: calibrated, quantized, exported, compared with the float model.

Weights are read and written in row chunks and calibration holds one block at a time, so a checkpoint may be larger than
memory; what needs the whole model at once (hints, fidelity, the search) is done when it fits.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import onnxruntime
import psutil

from sonoedge import __version__
from sonoedge.bundle import HINT_SCHEMA_FILE, TOKENIZER_FILE, BundleWriter, Contents, Golden, Hashes, Model
from sonoedge.calibration.pool import PhantomPool, phantom_pool
from sonoedge.development_key import sign_for_this_account
from sonoedge.device_profiles import Profile, load_profile
from sonoedge.errors import SonoEdgeError
from sonoedge.export.build_report import Built, report
from sonoedge.export.build_work import BuildWork
from sonoedge.export.bundle_graphs import DECODE, DECODER, VISION, WEIGHTS, stage_costs, write_graphs
from sonoedge.export.checkpoint_files import image_spec, is_random, open_tokenizer
from sonoedge.export.corpus import Corpus, PhantomCorpus, open_corpus
from sonoedge.export.expert_kernels import add_kernels, experts_spec, plugin_experts
from sonoedge.export.fidelity.cases import Cases, ConversationCases, PhantomCases
from sonoedge.export.fidelity_check import compare_with_float, has_floors, write_reports
from sonoedge.export.golden_cases import record_golden
from sonoedge.export.hint_trust import Trust, fit_trust
from sonoedge.export.layout import Layout, plan_layout
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.models.shards import TensorHeader, read_headers
from sonoedge.export.preset import CHECKPOINT as PINNED
from sonoedge.export.preset import PresetData, file_preset, phantom_preset, pin_experts, require_preset
from sonoedge.export.preset_cost import Pinning, floors_of, write_cost
from sonoedge.export.quantizing import Quantized, quantize, require_legal
from sonoedge.export.recipe import Recipe, load_recipe
from sonoedge.export.torch_session import decoder_spec
from sonoedge.export.weight_file import write_weights
from sonoedge.runtime import hints
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.prompt import SYSTEM
from sonoedge.runtime.sessions.ort import OrtSession
from sonoedge.runtime.tokens import Tokenizer

INTENDED_USE = (
    "Research and engineering only. Not a medical device; not for diagnosis or treatment decisions. "
    "Hints are statements of a statistical model about one frame and need a qualified reader."
)
TOOLCHAIN = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
THREADS = 2
BYTES_A_PARAMETER = 9  # the float32 model and two forms of its int8 graphs
PINNED_BYTES_A_PARAMETER = 4  # the float32 model of a preset beside the one with all experts
MEMORY_SHARE = 0.6  # of what is free now


class Data(msgspec.Struct, frozen=True):
    """What a build looks at: samples for activation ranges and, where the truth is known, frames for hints."""

    corpus: Corpus
    identity: str  # hash of what the samples are
    known: PhantomPool | None = None
    cases: Cases | None = None  # questions on which INT8 is compared with float
    preset: PresetData | None = None  # where the bundle is for one region


class _Job(msgspec.Struct, frozen=True):
    """What a build is asked for, read and checked."""

    checkpoint: Path
    recipe: Recipe
    device: Profile
    data: Data
    name: str
    config: ModelConfig
    headers: dict[str, TensorHeader]
    spec: ImageSpec
    tokenizer: Tokenizer
    random: bool

    @property
    def parameters(self) -> int:
        """How many the checkpoint has."""
        return sum(header.parameters for header in self.headers.values())

    @property
    def fits(self) -> bool:
        """Whether the float model and its int8 graphs can be in memory together."""
        each = BYTES_A_PARAMETER + (PINNED_BYTES_A_PARAMETER if self.data.preset else 0)
        return self.parameters * each < MEMORY_SHARE * int(psutil.virtual_memory().available)

    def of(self, checkpoint: Path) -> _Job:
        """The same job on another checkpoint."""
        config, headers = open_checkpoint(checkpoint)
        return msgspec.structs.replace(self, checkpoint=checkpoint, config=config, headers=headers)


def build_bundle(checkpoint: Path, recipe: Recipe, profile: str, data: Data, out: Path, *, name: str) -> Built:
    """Write the bundle `out` of a checkpoint folder.

    Raises SonoEdgeError for anything that cannot be built; nothing is then left at `out`. The work of a halted build is
    taken up by the next one of the same checkpoint, recipe, profile and data.
    """
    refuse_existing(out)
    config, headers = open_checkpoint(checkpoint)
    tokenizer = open_tokenizer(checkpoint, config)
    job = _Job(
        checkpoint,
        recipe,
        load_profile(profile),
        data,
        name,
        config,
        headers,
        image_spec(checkpoint),
        tokenizer,
        is_random(checkpoint),
    )
    whole = job.fits
    compared = {"fidelity": recipe.fidelity, "preset": None if data.preset is None else floors_of(data.preset.settings)}
    floors = [section for section, settings in compared.items() if settings is not None and has_floors(settings)]
    if floors and not whole and not job.random:
        raise SonoEdgeError(
            f"[{floors[0]}] has floors, and the float model and its graphs do not fit in this machine's memory "
            "together: build on a larger machine, or leave the floors out of the recipe"
        )
    with BuildWork(out, _identity(job)) as work:
        pinning = None
        if data.preset is not None:
            pinned = pin_experts(checkpoint, data.preset, tokenizer, job.spec, recipe.limits.context, work.folder)
            pinning = Pinning(checkpoint, config, pinned, data.preset)
            job = job.of(work.folder / PINNED)
        made = quantize(job.checkpoint, recipe, job.device, data.corpus, tokenizer, job.spec, work.folder, whole=whole)
        layout = plan_layout(job.config, made.plan)
        kept = _write_weights(work, made, layout)
        with BundleWriter(out, work.bundle) as writer:
            built = _assemble(job, made, layout, kept, work, writer, pinning, whole=whole)
    try:
        sign_for_this_account(out)
    except SonoEdgeError as error:
        return msgspec.structs.replace(built, unsigned_because=str(error))
    return built


def _write_weights(work: BuildWork, made: Quantized, layout: Layout) -> int:
    """The weights file; returns how many of its units an earlier run had finished."""
    headers = read_headers(made.checkpoint)
    files = sorted({header.file for header in headers.values()})
    identity = [msgspec.json.encode(layout).decode(), made.smoothing.sha256, *map(_stamp, files)]
    return write_weights(work.weights, layout, headers, made.smoothing, identity=_hash(*identity))


def _assemble(
    job: _Job,
    made: Quantized,
    layout: Layout,
    kept: int,
    work: BuildWork,
    writer: BundleWriter,
    pinning: Pinning | None,
    *,
    whole: bool,
) -> Built:
    """All the bundle's files around its weights; the session that will serve measures them where it fits in memory."""
    recipe, context = job.recipe, job.recipe.limits.context
    two_forms = recipe.quantization.graphs == "speed"
    decoder = decoder_spec(job.config, context)
    experts = experts_spec(job.config)
    plugins = plugin_experts(experts, job.device)
    rows = None if plugins is None else plugins.block_rows
    graphs = write_graphs(job.config, made.plan, layout, context, writer, two_forms=two_forms, block_rows=rows)
    kernels = add_kernels(plugins, job.device, graphs, writer)
    work.link_weights(writer.add(WEIGHTS))
    writer.add("calibration.json").write_bytes(made.table.encoded())
    shutil.copyfile(job.checkpoint / TOKENIZER_FILE, writer.add(TOKENIZER_FILE))
    schema_file = Path(hints.__file__).parent / HINT_SCHEMA_FILE
    shutil.copyfile(schema_file, writer.add(HINT_SCHEMA_FILE))
    session = None
    if whole:
        vision, many = writer.add(VISION.graph.path), writer.add(DECODER.graph.path)
        one = writer.add(DECODE.graph.path) if two_forms else None
        session = OrtSession(vision, many, job.spec, decoder, decode=one, threads=THREADS)
    shown = job.data.corpus if pinning is None else pinning.data.corpus
    golden = record_golden(job.checkpoint, session, shown, job.tokenizer, job.spec, recipe.limits, writer)
    trust = Trust()
    if session is not None and job.data.known is not None and recipe.hints is not None and not job.random:
        trust = fit_trust(session, job.tokenizer, job.data.known, recipe.hints, writer)
    faults = None
    if session is not None and job.data.cases is not None and recipe.fidelity is not None:
        cases = job.data.cases
        found = compare_with_float(job.checkpoint, made, session, trust.hints, job.tokenizer, cases, writer)
        if pinning is not None:
            found = msgspec.structs.replace(found, reference=f"float pinned for {pinning.data.region}")
        faults = write_reports(found, recipe.fidelity, cases, writer, gated=not job.random)
    cost = None
    if pinning is not None:
        cost = pinning.cost(job.checkpoint, made.plan, session, trust.hints, job.tokenizer, job.spec, context)
        cost = write_cost(cost, pinning.data, writer, gated=not job.random)
    if session is not None:
        session.close()
    prompt = _hash(schema_file.read_text(), msgspec.json.encode(SYSTEM, order="sorted").decode())
    contents = Contents(
        model=Model(job.name, job.config.architecture, job.parameters, job.random),
        hashes=Hashes(recipe=recipe.sha256, calibration=made.table.sha256, prompt=prompt),
        toolchain=toolchain(),
        profile=job.device.id,
        intended_use=INTENDED_USE,
        image=job.spec,
        decoder=decoder,
        graphs=graphs,
        golden=Golden("golden", golden.bound),
        stages=stage_costs(job.config, layout),
        hint_calibration=trust.hints,
        familiarity=trust.familiarity,
        preset=None if pinning is None else pinning.data.region,
        experts=experts,
        kernels=kernels,
    )
    return Built(
        writer.commit(contents), made.quantized_share, golden.error, trust.errors, kept, faults, made.tuning, cost
    )


def _identity(job: _Job) -> str:
    """Hash of all that a build depends on."""
    files = sorted({header.file for header in job.headers.values()})
    config = (job.checkpoint / "config.json").read_text()
    tokens = (job.checkpoint / TOKENIZER_FILE).read_text(encoding="utf-8")
    region = job.data.preset.region if job.data.preset else None
    asked = msgspec.json.encode((job.device, job.spec, region), order="sorted").decode()
    return _hash(__version__, job.recipe.sha256, asked, config, tokens, job.data.identity, *map(_stamp, files))


def _stamp(path: Path) -> str:
    """What tells one state of a file from another without reading it."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def run(
    checkpoint: Path,
    profile: str,
    recipe: str | None,
    calibration: str,
    out: Path,
    preset: str | None = None,
    *,
    as_json: bool,
) -> None:
    """The verb: build CHECKPOINT into the bundle OUT for a device profile, its experts pinned for the region PRESET."""
    settings = load_recipe(recipe)
    require_legal(settings, load_profile(profile))
    refuse_existing(out)
    config, _ = open_checkpoint(checkpoint)
    wanted = None if preset is None else require_preset(preset, settings, config)
    spec = image_spec(checkpoint)
    open_tokenizer(checkpoint, config)  # refused now, not after minutes of rendering
    with TemporaryDirectory(prefix="sonoedge-") as work:
        if calibration == "phantoms":
            data = phantom_data(Path(work), spec, settings, hints=not is_random(checkpoint))
            of_region = phantom_preset(Path(work), wanted, spec) if wanted else None
        else:
            data = file_data(Path(calibration), Path(work), spec, settings)
            of_region = file_preset(Path(calibration), data.corpus, wanted) if wanted else None
        data = msgspec.structs.replace(data, preset=of_region)
        built = build_bundle(checkpoint, settings, profile, data, out, name=checkpoint.resolve().name)
    report(out, built, as_json)


def refuse_existing(out: Path) -> None:
    """Raise SonoEdgeError when `out` is anything but absent or an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise SonoEdgeError(f"{out} exists: remove it, or choose another --out")


def toolchain() -> dict[str, str]:
    """The versions of what a build goes through; onnxruntime may be installed under its GPU distribution's name."""
    return {package: importlib.metadata.version(package) for package in TOOLCHAIN} | {
        "onnxruntime": onnxruntime.__version__
    }


def phantom_data(folder: Path, spec: ImageSpec, recipe: Recipe, *, hints: bool = True) -> Data:
    """Phantoms for all that the recipe looks at; `hints`: those on which hints are made trustworthy too."""
    settings, known = recipe.calibration, None
    ranges = _pool(folder, "calibration", settings.first_frame_seed, settings.frames, spec)
    if hints and recipe.hints is not None:
        known = _pool(folder, "confidence", recipe.hints.first_frame_seed, recipe.hints.frames, spec)
    identity = _hash("phantoms", msgspec.json.encode(spec).decode())
    return Data(PhantomCorpus(ranges, spec), identity, known, _phantom_cases(folder, spec, recipe))


def file_data(path: Path, folder: Path, spec: ImageSpec, recipe: Recipe) -> Data:
    """A user's own files; INT8 is compared with float on their conversations, on phantoms where they hold none."""
    corpus = open_corpus(str(path), spec, None)
    cases: Cases | None = None
    if path.suffix.lower() != ".json":
        cases = _phantom_cases(folder, spec, recipe)
    elif recipe.fidelity is not None:
        cases = ConversationCases(path, recipe.fidelity.frames)
    return Data(corpus, _hash(*map(_stamp, corpus.files)), None, cases)


def _phantom_cases(folder: Path, spec: ImageSpec, recipe: Recipe) -> Cases | None:
    settings = recipe.fidelity
    if settings is None:
        return None
    return PhantomCases(_pool(folder, "fidelity", settings.first_frame_seed, settings.frames, spec))


def _pool(folder: Path, name: str, seed: int, frames: int, spec: ImageSpec) -> PhantomPool:
    return phantom_pool(folder / name, frames, first_seed=seed, spec=spec, label=f"render {name} phantoms")
