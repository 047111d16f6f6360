"""The golden check: a session must repeat the outputs recorded when its bundle was built, or it does not serve."""

from __future__ import annotations

import zipfile
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import Bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import Patches
from sonoedge.runtime.sessions.base import Session


class GoldenCase(msgspec.Struct, frozen=True):
    """One picture with a question, and what the built graphs made of it when the bundle was made."""

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

    def save(self, path: Path) -> None:
        """Write the arrays as .npz."""
        np.savez_compressed(path, **msgspec.structs.asdict(self))


def load_case(path: Path) -> GoldenCase:
    """Read what `GoldenCase.save` wrote; raises SonoEdgeError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return GoldenCase(**{name: arrays[name] for name in GoldenCase.__struct_fields__})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SonoEdgeError(f"{path.name} is no golden case ({error}): build the bundle again") from error


def check(bundle: Bundle) -> float:
    """Load the bundle's session, run the golden check and return the largest relative error."""
    from sonoedge.runtime.sessions.ort import open_session

    session = open_session(bundle)
    try:
        return check_session(bundle, session)
    finally:
        session.close()


def check_session(bundle: Bundle, session: Session) -> float:
    """Largest error of any case, ‖logits − recorded‖ / ‖recorded‖; raises SonoEdgeError when it exceeds the manifest's bound."""
    golden = bundle.manifest.golden
    worst = 0.0
    names = sorted(name for name in bundle.manifest.files if name == golden.path or name.startswith(f"{golden.path}/"))
    for name in names:
        case = load_case(bundle.path(name))
        logits = case.run(session)
        error = float(np.linalg.norm(logits - case.logits) / np.linalg.norm(case.logits))
        if not error <= golden.bound:  # a NaN is an error too
            raise SonoEdgeError(
                f"{name}: this machine's outputs differ from those recorded at build by {error:.3g}, more than {golden.bound:g}: "
                "the backend computes wrongly here, so the bundle is not served"
            )
        worst = max(worst, error)
    return worst
