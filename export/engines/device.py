"""What engines need to know of a device: the part of a profile that says it has any."""

import msgspec

from sonoedge.device_profiles import Profile
from sonoedge.device_profiles.schema import Buckets, Software
from sonoedge.errors import SonoEdgeError


class Device(msgspec.Struct, frozen=True):
    """A device that runs engines."""

    id: str  # of its profile
    sm: int  # compute capability without the point: 87 is 8.7
    software: tuple[Software, ...]  # the newest first
    buckets: Buckets


def device_of(profile: Profile) -> Device:
    """Return what a profile says of engines; raises SonoEdgeError for one that has none."""
    if profile.gpu is None or profile.buckets is None or not profile.software:
        raise SonoEdgeError(
            f"profile {profile.id} needs no engines, ONNX Runtime serves it: choose a device that has some with "
            "--profile (`sonoedge profiles` lists them)"
        )
    return Device(profile.id, profile.gpu.sm, profile.software, profile.buckets)
