"""`sonoedge demo`: the whole path, from the packaged EchoVLM checkpoint to answers about a real clip and phantoms."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.markup import escape

from sonoedge.calibration.phantom import KINDS, REGIONS
from sonoedge.calibration.phantom.frame import Kind
from sonoedge.calibration.phantom_text import truth_fields
from sonoedge.calibration.pool import phantom_pool
from sonoedge.calibration.scores import score_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.build import build_bundle, phantom_data
from sonoedge.export.checkpoint_files import image_spec
from sonoedge.export.contact_sheet import HintLine, Tile, write_contact_sheet
from sonoedge.export.corpus import PhantomCorpus
from sonoedge.export.demo_play import Clip, Played, phantom_feed, play, real_clip
from sonoedge.export.distill import distil, distillation_pool, parameters
from sonoedge.export.evaluate import FIRST_FRAME_SEED, open_model, print_accuracy, rounded
from sonoedge.export.memory import PeakMemory
from sonoedge.export.models.loading import load_checkpoint, save_checkpoint
from sonoedge.export.recipe import load_recipe
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.protocol import Hint
from sonoedge.runtime.tokens import Tokenizer

CHECKPOINT = Path(__file__).parent / "demo_checkpoint"
EVALUATION_FRAMES = 500
CLIP_SEED = 8_000_000
CLIP_KINDS: tuple[Kind, ...] = (*KINDS, "none")
SHOWN_FRAMES = 4
OUTPUTS = {"bundle", "contact_sheet.png", "summary.json"}
QUESTIONS = (
    "Which region is shown?",
    "Is a lesion visible?",
    "是否可见病灶？",
    "Write a report about this image.",
)


class Seconds(dict[str, float]):
    """How long each step took."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the enclosed step."""
        began = time.monotonic()
        yield
        self[name] = round(time.monotonic() - began, 1)


def run(out: Path, as_json: bool) -> None:
    """The verb: leave `out` with the bundle, the contact sheet and the summary, in place of an earlier demo's.

    Raises SonoEdgeError when `out` holds anything else.
    """
    held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if not held <= OUTPUTS:
        raise SonoEdgeError(f"{out} holds more than an earlier demo's output: remove it, or choose another --out")
    with TemporaryDirectory(prefix=f".{out.name}-", dir=_parent(out)) as partial:
        summary = _demo(Path(partial), as_json)
        shutil.rmtree(out, ignore_errors=True)
        Path(partial).chmod(0o755)
        Path(partial).rename(out)
        Path(partial).mkdir()  # for the context, which removes it
    names = ", ".join(str(out / name) for name in sorted(OUTPUTS))
    Console(stderr=as_json, highlight=False).print(f"left {names}", soft_wrap=True)
    if as_json:
        told = {key: value for key, value in summary.items() if key not in ("hints", "answers")}
        print(msgspec.json.encode({"out": str(out), **told}).decode())


def _parent(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SonoEdgeError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    return out.parent


def _demo(out: Path, as_json: bool) -> dict[str, object]:
    """Fill `out`, which may move afterwards, and return the summary."""
    console = Console(stderr=as_json, highlight=False)
    seconds = Seconds()
    with PeakMemory() as memory, TemporaryDirectory(prefix="sonoedge-demo-") as work:
        accuracy = _make_bundle(Path(work), out / "bundle", seconds, console)
        with seconds.step("play"):
            played = _play(out / "bundle", Path(work), console)
        _draw(played, out / "contact_sheet.png")
    summary: dict[str, object] = {
        **accuracy,
        "hints": [_hint_entry(item, hint) for item in played for hint in item.hints],
        "answers": [
            {"clip": item.clip.name, "question": question, **msgspec.to_builtins(answer)}
            for item in played
            for question, answer in item.answers
        ],
        "seconds": seconds,
        "peak_memory_bytes": memory.bytes,
    }
    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
    total = sum(seconds.values())
    console.print(f"{total / 60:.1f} minutes, {memory.bytes / 1e9:.2f} GB at the peak")
    return summary


def _make_bundle(work: Path, bundle: Path, seconds: Seconds, console: Console) -> dict[str, dict[str, float]]:
    """Distil, quantize and export the packaged teacher; gives the accuracy of all three on the same fresh phantoms."""
    recipe, spec = load_recipe(), image_spec(CHECKPOINT)
    context = recipe.limits.context
    tokenizer = Tokenizer.from_file(CHECKPOINT / "tokenizer.json")
    with seconds.step("load"):
        teacher = load_checkpoint(CHECKPOINT)
    with seconds.step("render"):
        pool = distillation_pool(work / "train", spec, recipe)
        data = phantom_data(work, spec, recipe)
        fresh = phantom_pool(
            work / "fresh", EVALUATION_FRAMES, first_seed=FIRST_FRAME_SEED, spec=spec, label="render fresh phantoms"
        )
    with seconds.step("distil"):
        student = distil(teacher, tokenizer, PhantomCorpus(pool, spec), spec, recipe)
    console.print(f"student: {parameters(student):,} of the teacher's {parameters(teacher):,} parameters")
    with seconds.step("quantize and export"):
        folder = work / "student"
        save_checkpoint(student, folder, tokenizer_files_from=CHECKPOINT)
        build_bundle(folder, recipe, "cpu-x86-64", data, bundle, name="sonoedge-demo-student")
    with seconds.step("evaluate"):
        scored = {
            "teacher": score_pool(TorchSession(teacher, spec, context), tokenizer, fresh, "score the teacher"),
            "student": score_pool(TorchSession(student, spec, context), tokenizer, fresh, "score the student"),
            "int8": score_pool(*open_model(bundle), fresh, "score the INT8 bundle"),
        }
    rows = {name: rounded(result) for name, result in scored.items()}
    print_accuracy(rows, f"accuracy on {EVALUATION_FRAMES} fresh phantoms", console)
    print_accuracy(
        {f"int8, {name}": row for name, row in scored["int8"].strata().items()}, "by quality and size", console
    )
    return {f"{name}_accuracy": row for name, row in rows.items()}


def _play(bundle: Path, work: Path, console: Console) -> list[Played]:
    clips = [real_clip(), *(_feed(i, work / "clips") for i in range(len(REGIONS)))]
    played = []
    for clip in clips:
        item = play(bundle, clip, QUESTIONS)
        played.append(item)
        console.print(
            f"[bold]{clip.name}[/]" + (f"  (truth: {_truth_text(clip, item.hints[-1].frame)})" if clip.truths else "")
        )
        for hint in _last_hints(item):
            said = f"{hint.text.en} {hint.text.zh}" if hint.text is not None else f"silent: {hint.reason}"
            console.print(
                f"  {hint.hint}: {said} ({hint.probability:.0%}, frame {hint.frame}, {hint.age_ms:.0f} ms old)"
            )
        for question, answer in item.answers:
            # A model may say anything, brackets too, which rich would read as markup.
            console.print(f"  [dim]{question}[/] {escape(answer.answer)} [dim]({answer.ms:.0f} ms)[/]")
    return played


def _feed(index: int, folder: Path) -> Clip:
    """One region's phantom; the kinds of lesion take turns, and every fifth clip has none."""
    region, kind = REGIONS[index], CLIP_KINDS[index % len(CLIP_KINDS)]
    return phantom_feed(region, kind, CLIP_SEED + index, folder / region)


def _last_hints(item: Played) -> list[Hint]:
    last = item.hints[-1].frame
    return [hint for hint in item.hints if hint.frame == last]


def _draw(played: Sequence[Played], path: Path) -> None:
    rows = {}
    for item in played:
        frames = sorted({hint.frame for hint in item.hints})
        shown = frames[:: max(1, len(frames) // SHOWN_FRAMES)][:SHOWN_FRAMES]
        rows[item.clip.name] = [_tile(item, frame) for frame in shown]
    write_contact_sheet(
        rows, path, "SonoEdge demo: live hints of the INT8 student (green right, red wrong, grey silent)"
    )


def _tile(item: Played, frame: int) -> Tile:
    clip = item.clip
    lines = [
        HintLine(hint.hint, hint.answer, hint.probability, _truth_of(clip, hint), hint.reason)
        for hint in item.hints
        if hint.frame == frame
    ]
    truth = f"frame {frame}, truth: {_truth_text(clip, frame)}" if clip.truths else f"frame {frame}, truth: unlabelled"
    return Tile(clip.images[frame % len(clip.images)], lines, truth)


def _truth_of(clip: Clip, hint: Hint) -> str | None:
    if not clip.truths:
        return None
    # A lesion question about a frame without a lesion has no right answer: whatever is said is wrong.
    return getattr(truth_fields(clip.truths[hint.frame % len(clip.truths)]), hint.hint) or "none"


def _truth_text(clip: Clip, frame: int) -> str:
    fields = truth_fields(clip.truths[frame % len(clip.truths)])
    lesion = "no lesion" if fields.kind is None else f"{fields.kind} {fields.side}"
    return f"{fields.quality}, {lesion}"


def _hint_entry(item: Played, hint: Hint) -> dict[str, object]:
    return {"clip": item.clip.name, "truth": _truth_of(item.clip, hint), **msgspec.to_builtins(hint)}
