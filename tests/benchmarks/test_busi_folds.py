"""Folds of BUSI: near pictures together, classes even, nothing of a held-out case in its training file."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from benchmarks import busi_folds
from benchmarks.busi_folds import CLASSES, DATA, FOLDS, class_of, joined, measured, split, with_choice

from sonoedge.calibration.conversations import Conversation, Turn, read_conversations
from sonoedge.calibration.questions import Question, Task, questions
from sonoedge.export.evaluation.answers import Answered, Said, Seen


def test_groups_stay_whole_and_classes_are_even() -> None:
    rng = np.random.default_rng(0)
    classes = [*(["benign"] * 100), *(["malignant"] * 50), *(["normal"] * 30)]
    order = rng.permutation(180)
    groups = [list(map(int, order[start : start + size])) for start, size in ((0, 9), (9, 5), (14, 4))]
    groups += [[int(index)] for index in order[18:]]
    folds = split(classes, groups, FOLDS, 6)
    for group in groups:
        assert len({folds[index] for index in group}) == 1
    for name in set(classes):
        counts = Counter(fold for fold, own in zip(folds, classes, strict=True) if own == name)
        assert max(counts.values()) - min(counts[fold] for fold in range(FOLDS)) <= 6
    assert folds == split(classes, groups, FOLDS, 6)
    assert folds != split(classes, groups, FOLDS, 7)


@pytest.fixture
def case() -> Conversation:
    turns = (Turn("system", "s"), Turn("human", "<image>请描述。"), Turn("gpt", "提示恶性病变。"))
    return Conversation("malignant (3).png", ("x/malignant_3.png",), turns)


def test_the_class_is_asked_without_the_description(case: Conversation) -> None:
    assert class_of(case) == "malignant"
    orders = set()
    for seed in range(12):
        described, chosen = with_choice(case, np.random.default_rng(seed))
        assert described.exchanges == case.exchanges
        (asked,) = questions(chosen)
        assert asked.task is Task.DIAGNOSIS
        assert asked.classes[asked.right or 0] == CLASSES["malignant"]
        assert asked.turns == ()
        orders.add(asked.classes)
    assert len(orders) > 3


def test_answers_of_folds_are_scored_together() -> None:
    asked = (
        Question(Task.REPORT, "description", "请描述。", ("左侧囊肿。",)),
        Question(Task.DIAGNOSIS, "single choice", "?", ("A",), ("A", "B"), ("正常", "恶性"), 0),
    )

    def fold(right: bool) -> list[Answered]:
        seen = tuple(Seen(f"{n}", asked, "breast", None, 1.0, 1.0) for n in range(5))
        said = (Said("左侧囊肿。", "stop"), Said("A", "stop", 0 if right else 1, (0.5, 0.5)))
        return [Answered(seen, (said,) * 5)] * 3

    rows = {row.measure: row for row in measured(joined([fold(True), fold(False)]))}
    assert list(rows) == ["BLEU-1", "ROUGE-1", "accuracy", "macro-F1"]
    assert rows["accuracy"].cases == 10
    assert rows["accuracy"].systems["teacher"][0] == 50
    assert rows["BLEU-1"].systems["INT8 student"][0] == 100
    assert rows["accuracy"].to_teacher["student"] == (0, 0, 0)


@pytest.mark.skipif(not DATA.is_file(), reason="waits for BUSI in ../shared/data/busi")
def test_a_fold_trains_on_what_it_does_not_hold_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = read_conversations(DATA)[:10]
    held = [number < 4 for number in range(10)]
    trained: list[Path] = []

    def no_training(training: Path, folder: Path, steps: int, batch: int) -> dict[str, Path]:
        trained.append(training)
        return {}

    monkeypatch.setattr(busi_folds, "train_and_build", no_training)
    assert busi_folds.run_fold(cases, held, tmp_path / "fold", 1, 1) == []
    seen = {image for entry in json.loads(trained[0].read_text()) for image in entry["image"]}
    kept = {image for entry in json.loads((tmp_path / "fold/held_out.json").read_text()) for image in entry["image"]}
    assert (len(seen), len(kept), seen & kept) == (6, 4, set())
