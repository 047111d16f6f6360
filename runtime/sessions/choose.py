"""Which backend serves a bundle: the one asked for, else the one that its device profile names; never another."""

from typing import Literal

from sonoedge.bundle import Bundle
from sonoedge.device_profiles import load_profile
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sessions.base import Session

Backend = Literal["tensorrt", "cuda", "cpu"]


def open_session(bundle: Bundle, backend: Backend | None = None) -> Session:
    """Load a bundle on `backend`; raises SonoEdgeError when that cannot be had, saying how it can."""
    match backend or _of_profile(bundle):
        case "tensorrt":
            from sonoedge.runtime.sessions import tensorrt

            return tensorrt.open_session(bundle)
        case "cuda":
            from sonoedge.runtime.sessions import ort_cuda

            return ort_cuda.open_session(bundle)
        case "cpu":
            from sonoedge.runtime.sessions import ort

            return ort.open_session(bundle)


def unchecked_engines(session: Session) -> str | None:
    """The profile of engines that no device has checked yet, None for anything else."""
    from sonoedge.runtime.sessions.tensorrt import TensorRtSession

    if isinstance(session, TensorRtSession) and session.engines.golden.state == "not run":
        return session.engines.profile
    return None


def _of_profile(bundle: Bundle) -> Backend:
    """The backend of the profile that the bundle was built for."""
    try:
        profile = load_profile(bundle.manifest.profile)
    except SonoEdgeError as error:
        raise SonoEdgeError(
            f"{bundle.root} was built for the profile {bundle.manifest.profile}, which is none of this SonoEdge's: "
            "say --backend tensorrt, cuda or cpu"
        ) from error
    return "tensorrt" if profile.backend == "tensorrt" else "cpu"
