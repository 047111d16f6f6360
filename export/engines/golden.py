"""The golden check of engines that were just built, before they take the place of older ones."""

from pathlib import Path

from sonoedge.bundle import Bundle
from sonoedge.engine_manifest import EngineSet
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.library import Library


def check_engines(bundle: Bundle, folder: Path, engines: EngineSet, library: Library) -> float:
    """Run the recorded cases on this machine's GPU and return the largest error.

    Raises SonoEdgeError when an engine cannot run or gives other outputs than those recorded when the bundle was built.
    """
    # Pictures are not read where engines are only built.
    from sonoedge.runtime.golden import check_session
    from sonoedge.runtime.sessions.gpu import load_cudart
    from sonoedge.runtime.sessions.tensorrt import TensorRtSession

    manifest = bundle.manifest
    try:
        session = TensorRtSession(folder, engines, manifest.image, manifest.decoder, library.module, load_cudart())
        try:
            return check_session(bundle, session)
        finally:
            session.close()
    except SonoEdgeError as error:
        raise SonoEdgeError(f"the engines for {engines.profile} are wrong and were removed: {error}") from error
