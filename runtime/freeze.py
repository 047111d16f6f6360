"""The verb `freeze`: keep a frame of a running server under a name, or let it go."""

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client
from sonoedge.runtime.key_files import ClientKeys


def run(
    endpoint: str,
    name: str | None,
    release: bool,
    timeout_s: float | None,
    as_json: bool,
    keys: ClientKeys | None = None,
) -> None:
    """Freeze or release and say which frame it is; raises SonoEdgeError when the server refuses."""
    if release and name is None:
        raise SonoEdgeError("--release lets a frame of a name go, and there is none: give its NAME")
    with Client(endpoint, timeout_s=timeout_s, keys=keys) as client:
        frozen = client.release(name) if release and name is not None else client.freeze(name)
    if as_json:
        print(msgspec.json.encode(frozen).decode())
        return
    about = f"{frozen.name}: frame {frozen.frame}, {frozen.age_ms:.0f} ms old"
    print(f"released {about}" if frozen.released else f"frozen {about}; ask about it with --frame {frozen.name}")
