"""Teacher, student and INT8 bundle on BUSI, each fold answered by models that were trained on the other folds.

python -m benchmarks.busi_folds [--folds 5] [--steps 600] [--out FOLDER]

Needs `../shared/data/busi`. Every picture is asked for its description, as the file has it, and for its class as a
single choice. Pictures that are near each other stay in one fold. The teacher is the packaged checkpoint, taught the
training folds at its own size; the student is cut from it and distilled; the bundle is the student's. All three are
trained and built by the verbs `distill` and `build`. `--folds` runs the first of the five only. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from sonoedge.calibration.conversations import Conversation, Turn, read_conversations
from sonoedge.calibration.perceptual_hash import near_groups, perceptual_hash
from sonoedge.calibration.questions import Task
from sonoedge.errors import SonoEdgeError
from sonoedge.export import build, distill
from sonoedge.export.evaluate import open_model
from sonoedge.export.evaluation.answers import Answered, answer_all
from sonoedge.export.evaluation.cases import FileCases
from sonoedge.export.evaluation.resampling import Interval
from sonoedge.export.evaluation.score import score
from sonoedge.export.models.config_json import read_config
from sonoedge.export.recipe import DEFAULT
from sonoedge.export.train_demo import CHECKPOINT
from sonoedge.progress import track
from sonoedge.runtime.prompt import LETTERS, single_choice
from sonoedge.runtime.sources.pictures import read_picture

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "busi" / "conversations.json"
FOLDS = 5
SEED = 6
CLASSES = {"normal": "正常", "benign": "良性病变", "malignant": "恶性病变"}
QUESTION = "这张乳腺超声图像属于哪一类？"
PROFILE = "cpu-x86-64"
TEACHER, STUDENT, INT8 = "teacher", "student", "INT8 student"
MEASURED = (
    (Task.REPORT, "BLEU-1"),
    (Task.REPORT, "ROUGE-1"),
    (Task.DIAGNOSIS, "accuracy"),
    (Task.DIAGNOSIS, "macro-F1"),
)


class Row(msgspec.Struct, frozen=True):
    """One measure over all folds that were run: each system with its interval, then the differences to the teacher."""

    measure: str
    cases: int
    systems: dict[str, tuple[float, float | None, float | None]]
    to_teacher: dict[str, tuple[float, float | None, float | None]]


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    folds: int
    of: int
    seed: int
    steps: int
    training_cases: tuple[int, ...]  # of each fold that was run
    held_out_cases: tuple[int, ...]
    near_groups: int  # of more than one picture
    rows: tuple[Row, ...]


def split(classes: Sequence[str], groups: Sequence[Sequence[int]], folds: int, seed: int) -> list[int]:
    """The fold of each case: groups stay whole, and each class is spread evenly."""
    fold_of = [0] * len(classes)
    filled: Counter[tuple[str, int]] = Counter()
    order = np.random.default_rng(seed).permutation(len(groups))
    for group in sorted((groups[index] for index in order), key=len, reverse=True):  # large ones while there is room
        held = Counter(classes[case] for case in group)
        fold = min(range(folds), key=lambda fold: (sum(filled[name, fold] * held[name] for name in held), fold))
        for case in group:
            fold_of[case] = fold
            filled[classes[case], fold] += 1
    return fold_of


def class_of(case: Conversation) -> str:
    """What the name of a BUSI picture says it shows."""
    return Path(case.image[0]).name.partition("_")[0]


def with_choice(case: Conversation, rng: np.random.Generator) -> tuple[Conversation, Conversation]:
    """The case as it is, and its picture once more, asked for its class: apart, so that no text gives it away."""
    order = [list(CLASSES)[index] for index in rng.permutation(len(CLASSES))]
    question = "<image>" + single_choice(QUESTION, [CLASSES[name] for name in order])
    turns = (Turn("human", question), Turn("gpt", LETTERS[order.index(class_of(case))]))
    described = msgspec.structs.replace(case, region="breast")
    return described, Conversation(f"{case.id} class", case.image, turns, region="breast")


def recipe(path: Path, training: Path, steps: int, batch: int, student: dict[str, int] | None) -> Path:
    """Write the demo's recipe for this data; student: sizes other than the demo's, taught by the answers alone."""
    entries = len(read_conversations(training))
    settings: dict[str, Any] = msgspec.toml.decode(DEFAULT.read_bytes())
    for name in ("hints", "preset"):
        settings.pop(name, None)
    settings["distill"] |= {"steps": steps, "batch": batch, "warmup_steps": 10, "vision_steps": 0}
    if student is not None:
        settings["student"] |= student
        settings["distill"] |= {"logits_weight": 0.0, "embeds_weight": 0.0, "learning_rate": 5e-4}
    settings["calibration"]["frames"] = min(settings["calibration"]["frames"], entries)
    lines = [f"version = {settings.pop('version')}"]
    for name, section in settings.items():
        plain = {key: value for key, value in section.items() if not isinstance(value, dict)}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def own_shape(checkpoint: Path) -> dict[str, int]:
    """The sizes of a checkpoint as a recipe names a student's."""
    config = read_config(checkpoint)
    assert config.moe is not None
    return {
        "vision_layers": config.vision.depth,
        "vision_mlp_size": config.vision.mlp_size,
        "layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "expert_size": config.moe.moe_intermediate_size,
        "shared_expert_size": config.moe.shared_expert_intermediate_size,
    }


def train_and_build(training: Path, folder: Path, steps: int, batch: int) -> dict[str, Path]:
    """Teach the teacher, distil the student, build its bundle; the verbs' own output is not shown."""
    made = {TEACHER: folder / "teacher", STUDENT: folder / "student", INT8: folder / "bundle"}
    teaching = recipe(folder / "teach.toml", training, steps, batch, own_shape(CHECKPOINT))
    distilling = recipe(folder / "distil.toml", training, steps, batch, None)
    with contextlib.redirect_stdout(io.StringIO()):
        distill.run(CHECKPOINT, str(teaching), str(training), made[TEACHER], as_json=True)
        distill.run(made[TEACHER], str(distilling), str(training), made[STUDENT], as_json=True)
        build.run(made[STUDENT], PROFILE, str(distilling), str(training), made[INT8], as_json=True)
    return made


def run_fold(
    cases: Sequence[Conversation], held_out: Sequence[bool], folder: Path, steps: int, batch: int
) -> list[Answered]:
    """Train on what is not held out and let every system answer the rest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    doubled = [with_choice(case, rng) for case in cases]
    files = {}
    for name, wanted in (("training", False), ("held_out", True)):
        entries = [entry for pair, held in zip(doubled, held_out, strict=True) if held is wanted for entry in pair]
        files[name] = folder / f"{name}.json"
        files[name].write_bytes(msgspec.json.encode(entries))
    answered = []
    for name, path in train_and_build(files["training"], folder, steps, batch).items():
        session, tokenizer = open_model(path)
        answered.append(
            answer_all(session, tokenizer, FileCases(files["held_out"]), f"{name} answers the held-out fold")
        )
        session.close()
    return answered


def joined(folds: Sequence[Sequence[Answered]]) -> list[Answered]:
    """The answers of every system to all folds."""
    return [
        Answered(
            tuple(case for fold in folds for case in fold[system].cases),
            tuple(said for fold in folds for said in fold[system].said),
        )
        for system in range(len(folds[0]))
    ]


def measured(answered: Sequence[Answered]) -> tuple[Row, ...]:
    """The scores of the three systems over all answers."""
    names = [TEACHER, STUDENT, INT8]
    scores = score(answered, names).scores
    rows = []
    for task, measure in MEASURED:
        found = next(s for s in scores if (s.task, s.measure, s.group) == (task, measure, "all"))
        intervals = {name: _numbers(one) for name, one in zip(names, found.systems, strict=True)}
        differences = [difference.interval for difference in found.differences]
        rows.append(
            Row(measure, found.cases, intervals, {n: _numbers(d) for n, d in zip(names[1:], differences, strict=True)})
        )
    return tuple(rows)


def _numbers(found: Interval) -> tuple[float, float | None, float | None]:
    """The value and its bounds to two places."""
    if found.low is None or found.high is None:
        return round(found.value, 2), None, None
    return round(found.value, 2), round(found.low, 2), round(found.high, 2)


def main(
    folds: Annotated[int, typer.Option(min=1, max=FOLDS, help="How many of the five are run.")] = FOLDS,
    steps: Annotated[int, typer.Option(min=12, help="Training steps of teacher and student, each.")] = 600,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    cases: Annotated[
        int | None, typer.Option(min=FOLDS, help="Use that many pictures only.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the models here; a new folder.", show_default=False)] = None,
) -> None:
    """Measure and print a line of JSON."""
    if not DATA.is_file():
        raise SonoEdgeError(f"{DATA} does not exist: put BUSI's pictures and its conversation file there")
    known = list(read_conversations(DATA))
    if cases is not None:
        known = [known[index] for index in np.random.default_rng(SEED).permutation(len(known))[:cases]]
    hashes = []
    with track("hash the pictures", len(known)) as advance:
        for case in known:
            hashes.append(perceptual_hash(read_picture(Path(case.image[0]))))
            advance(1)
    groups = near_groups(hashes)
    fold_of = split([class_of(case) for case in known], groups, FOLDS, SEED)
    done = []
    with TemporaryDirectory(prefix="sonoedge-") as work:
        for fold in range(folds):
            folder = (out or Path(work)) / f"fold{fold}"
            done.append(run_fold(known, [own == fold for own in fold_of], folder, steps, batch))
    held = tuple(fold_of.count(fold) for fold in range(folds))
    report = Report(
        benchmark="busi_folds",
        folds=folds,
        of=FOLDS,
        seed=SEED,
        steps=steps,
        training_cases=tuple(len(known) - count for count in held),
        held_out_cases=held,
        near_groups=sum(len(group) > 1 for group in groups),
        rows=measured(joined(done)),
    )
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    typer.run(main)
