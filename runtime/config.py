"""The configuration of `serve`: one TOML file with every option; what is said on the command line wins."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.audit import MAX_BYTES, SMALLEST_BYTES
from sonoedge.runtime.kept_frames import MAX_BYTES as KEPT_MAX_BYTES
from sonoedge.runtime.logs import LogLevel
from sonoedge.runtime.orientation import Flip
from sonoedge.runtime.sessions.choose import Backend
from sonoedge.runtime.sources import FASTEST

_WAY_OUT = "`sonoedge serve --print-config` shows every key"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every option of `serve`, under the names of the command line; a None is not set."""

    bundle: str | None = None
    source: str | None = None
    bind: str = "tcp://127.0.0.1:5555"
    hints_bind: str = "tcp://127.0.0.1:5556"
    once: bool = False
    fps: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None  # None: the source's own
    speed: Annotated[float, msgspec.Meta(gt=0, le=FASTEST)] = 1.0  # of a recording, times its own
    step: bool = False  # play a recording frame by frame: the next when the last is done with, none dropped
    backend: Backend | None = None  # None: what the bundle's device profile names
    server_key: str | None = None  # file of the server's CURVE keys; with `allow` only
    allow: str | None = None  # folder of the clients' public keys
    trusted: str | None = None  # folder of the keys that may have signed the bundle; None: this machine's
    allow_untrusted: bool = False  # serve a bundle that nobody signed, or none of them
    audit: str | None = None  # folder of the audit log; None: none is kept
    audit_max_bytes: Annotated[int, msgspec.Meta(ge=SMALLEST_BYTES)] = MAX_BYTES
    keep_frames: str | None = None  # folder of the frames that the audit log is about; with `audit` only
    keep_frames_max_bytes: Annotated[int, msgspec.Meta(ge=1)] = KEPT_MAX_BYTES
    flip: Flip = "auto"  # whether left and right are exchanged; auto: as the feed or its orientation marker says
    log_level: LogLevel = "warning"


def read_config(path: Path | None, options: Mapping[str, object]) -> Config:
    """Return what `path` says, with `options` in place of it; a None among those says nothing.

    Raises SonoEdgeError naming the file and the key when it is not TOML, or a key is unknown or has a wrong value.
    """
    tree: dict[str, Any] = {} if path is None else _load(path)
    tree |= {name: value for name, value in options.items() if value is not None}
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise SonoEdgeError(f"{path or 'the options of serve'}: {error}: correct it; {_WAY_OUT}") from error


def print_config(config: Config) -> str:
    """Return the configuration as TOML that `read_config` reads again; keys that are not set stand in comments."""
    lines = [
        f"# {name} is not set" if value is None else f"{name} = {_value(value)}"
        for name, value in msgspec.structs.asdict(config).items()
    ]
    return "\n".join(lines) + "\n"


def _load(path: Path) -> dict[str, Any]:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise SonoEdgeError(f"{path}: {error.strerror}: name a file that can be read with --config") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{path} is not TOML ({error}): correct that line; {_WAY_OUT}") from error


def _value(value: object) -> str:
    """Write a value; JSON's strings, numbers and booleans are TOML's, but for DEL, which TOML has escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
