"""Everything that a bundle brings to the runtime: session, tokenizer, hints, and what every message says of it."""

from pathlib import Path

import msgspec
from rich.console import Console

from sonoedge.bundle import HINT_SCHEMA_FILE, TOKENIZER_FILE, open_bundle
from sonoedge.runtime.familiarity import load_familiarity
from sonoedge.runtime.golden import check_session
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.sessions.choose import Backend, open_session, unchecked_engines
from sonoedge.runtime.tokens import Tokenizer


class Model(msgspec.Struct, frozen=True):
    """A loaded model; `id` is the hash that names it in every message."""

    session: Session
    tokenizer: Tokenizer
    engine: HintEngine
    id: str
    intended_use: str


def open_model(
    path: Path, backend: Backend | None = None, *, trusted: Path | None = None, require_signature: bool = False
) -> Model:
    """Check and load the bundle at `path` and repeat its golden outputs; raises SonoEdgeError naming what is wrong.

    backend: what runs it; None is what the bundle's device profile names. trusted: folder of the keys one of which must
    have signed the bundle when `require_signature`, as for `trusted_keys`.
    """
    bundle = open_bundle(path, trusted=trusted, require_signature=require_signature)
    manifest = bundle.manifest
    tokenizer = Tokenizer.from_file(bundle.path(TOKENIZER_FILE))
    schema = load_schema(bundle.path(HINT_SCHEMA_FILE))
    familiarity = load_familiarity(bundle.path(manifest.familiarity)) if manifest.familiarity is not None else None
    session = open_session(bundle, backend)
    profile = unchecked_engines(session)
    if profile is not None:
        _say(f"no device has checked the engines of {profile} yet: repeating the recorded outputs before anything runs")
    error = check_session(bundle, session)
    if profile is not None:
        _say(f"largest difference {error:.2g}, allowed {manifest.golden.bound:.2g}")
    engine = HintEngine(session, tokenizer, schema, calibration=manifest.hint_calibration, familiarity=familiarity)
    return Model(session, tokenizer, engine, manifest.model.id, manifest.intended_use)


def _say(line: str) -> None:
    Console(stderr=True, highlight=False, markup=False).print(line, soft_wrap=True)
