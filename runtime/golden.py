"""The golden check: a session must repeat the outputs recorded when its bundle was built, or it does not serve."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import Bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import Patches
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.sessions.choose import Backend, open_session


class GoldenCase(msgspec.Struct, frozen=True):
    """One picture with a question, and what the float model made of it when the bundle was built."""

    patches: npt.NDArray[np.float32]  # [n, 1176]
    grid: npt.NDArray[np.int64]  # [3]
    ids: npt.NDArray[np.int64]  # [s]
    positions: npt.NDArray[np.int64]  # [3, s]
    logits: npt.NDArray[np.float32]  # [s, vocab]

    def run(self, session: Session) -> npt.NDArray[np.float32]:
        """Logits [s, vocab] of this session for the same inputs."""
        t, h, w = (int(n) for n in self.grid)
        embeds = session.encode_image(Patches(self.patches, (t, h, w)))
        session.rewind(0)
        logits = session.extend(self.ids, self.positions, image_embeds=embeds, logits_rows=np.arange(len(self.ids)))
        session.rewind(0)
        return logits

    def error(self, session: Session) -> float:
        """How far this session is off, ‖logits − recorded‖ / ‖recorded‖; infinite for logits of another shape."""
        logits = self.run(session)
        if logits.shape != self.logits.shape:
            return math.inf
        return float(np.linalg.norm(logits - self.logits) / np.linalg.norm(self.logits))

    def save(self, path: Path) -> None:
        """Write the arrays as .npz."""
        np.savez_compressed(path, **msgspec.structs.asdict(self))


def load_case(path: Path) -> GoldenCase:
    """Read what `GoldenCase.save` wrote; raises SonoEdgeError when it is damaged or its shapes do not fit together."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            case = GoldenCase(**{name: arrays[name] for name in GoldenCase.__struct_fields__})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SonoEdgeError(f"{path.name} is no golden case ({error}): build the bundle again") from error
    shapes = {name: array.shape for name, array in msgspec.structs.asdict(case).items()}
    match shapes:
        case {"patches": (n, _), "grid": (3,), "ids": (s,), "positions": (3, t), "logits": (rows, _)}:
            fits = s == t == rows > 0 and n == int(np.prod(case.grid))
        case _:
            fits = False
    if not fits:
        raise SonoEdgeError(f"{path.name} is no golden case, its shapes are {shapes}: build the bundle again")
    return case


def check(bundle: Bundle, backend: Backend | None = None) -> float:
    """Load the bundle on a backend (None: its profile's), run the golden check, return the largest relative error."""
    session = open_session(bundle, backend)
    try:
        return check_session(bundle, session)
    finally:
        session.close()


def check_session(bundle: Bundle, session: Session) -> float:
    """Largest error of any case; raises SonoEdgeError naming the case whose error exceeds the bound of the manifest."""
    golden = bundle.manifest.golden
    worst = 0.0
    names = sorted(name for name in bundle.manifest.files if name == golden.path or name.startswith(f"{golden.path}/"))
    for name in names:
        case = load_case(bundle.path(name))
        error = case.error(session)
        if not error <= golden.bound:  # a NaN is an error too
            raise SonoEdgeError(
                f"{name}: this machine's outputs differ from those recorded at build by {error:.3g}, more than "
                f"{golden.bound:g}: the backend computes wrongly here, so the bundle is not served"
            )
        worst = max(worst, error)
    return worst
