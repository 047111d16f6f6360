"""What GPU this machine has, for what can be built and checked on one of its kind only."""

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.device import Device
from sonoedge.export.engines.library import Library
from sonoedge.runtime.sessions.gpu import Gpu, find_gpu, load_cudart, newest_ptx


class Here(msgspec.Struct, frozen=True):
    """The GPU when it is of the profile's kind; else why the engines cannot run here."""

    gpu: Gpu | None
    lack: str = ""


def look_here(device: Device, library: Library) -> Here:
    """Look for a GPU of the device's kind; raises SonoEdgeError when the library needs one and none is here."""
    here = _look(device)
    if here.gpu is None and library.needs_gpu:
        raise SonoEdgeError(
            f"{library} builds for the GPU that it runs on, and {here.lack}: run `sonoedge engine` on the device"
        )
    return here


def _look(device: Device) -> Here:
    try:
        gpu = find_gpu(load_cudart())
    except SonoEdgeError as error:
        return Here(None, str(error).partition(":")[0])
    if gpu.sm != device.sm:
        return Here(None, f"this machine has {gpu.name} (sm_{gpu.sm}) and {device.id} is sm_{device.sm}")
    return Here(gpu)


def readable_ptx(library: Library, gpu: Gpu) -> int:
    """The newest PTX that both the profile's software and the driver that is here read."""
    return min(library.software.ptx_version, newest_ptx(gpu.cuda))
