"""The packaged checkpoint: small enough to ship, all of EchoVLM present, and it answers about frames it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from sonoedge.calibration.pool import phantom_pool
from sonoedge.calibration.scores import score_pool
from sonoedge.export.demo import CHECKPOINT
from sonoedge.export.evaluate import open_model
from sonoedge.export.models.config import ECHOVLM
from sonoedge.export.models.loading import open_checkpoint

FLOORS = {"region": 0.98, "finding": 0.92, "kind": 0.85, "side": 0.88}
FRAMES = 200
FIRST_SEED = 9_500_000  # of no recipe and no evaluation


def test_it_is_an_echovlm_of_at_most_12_mb() -> None:
    config, headers = open_checkpoint(CHECKPOINT)
    assert config.architecture == ECHOVLM
    assert any(".moe.experts.3." in key for key in headers)
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12_000_000


def test_it_answers_about_fresh_phantoms(tmp_path: Path) -> None:
    session, tokenizer = open_model(CHECKPOINT)
    pool = phantom_pool(tmp_path, FRAMES, first_seed=FIRST_SEED, spec=session.image)
    accuracy = score_pool(session, tokenizer, pool, "score").accuracy()
    for question, floor in FLOORS.items():
        assert accuracy[question] >= floor, accuracy


@pytest.mark.parametrize("name", ["README.md", "evaluation.json", "tokenizer.json", "preprocessor_config.json"])
def test_its_card_and_files_are_there(name: str) -> None:
    assert (CHECKPOINT / name).stat().st_size > 0
