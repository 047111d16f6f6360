"""A process that serves a fake model through the verb `serve`: TOKENIZER SOURCE [options of serve]."""

import sys
from pathlib import Path
from unittest import mock

from sonoedge.cli import main
from sonoedge.runtime.frame_gate import FrameGate
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.model import Model
from sonoedge.runtime.sector.tracker import SectorTracker
from sonoedge.runtime.sector.view import whole
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.tokens import Tokenizer


def load(_bundle: Path, _backend: object = None, **_policy: object) -> Model:
    """Stand in for `open_model`."""
    tokenizer, schema = Tokenizer.from_file(sys.argv[1]), load_schema()
    session = FakeSession(tokenizer, schema, step_s=0.002)
    return Model(session, tokenizer, HintEngine(session, tokenizer, schema), "fake", "Tests only.")


if __name__ == "__main__":
    options = ["--bind", "tcp://127.0.0.1:*", "--hints-bind", "tcp://127.0.0.1:*", "--json"]
    with (  # served shades hold no sector
        mock.patch.object(SectorTracker, "see", lambda _tracker, image, *, still: whole(image.shape)),
        mock.patch.object(FrameGate, "judge", return_value=None),
        mock.patch("sonoedge.runtime.serve.open_model", load),
    ):
        sys.exit(main(["serve", "bundle", "--source", sys.argv[2], *options, *sys.argv[3:]]))
