"""Known devices, one TOML file each, and the user's own files in the same form."""

from pathlib import Path

import msgspec

from sonoedge.device_profiles.schema import Profile, check_agreement, check_sources
from sonoedge.errors import SonoEdgeError
from sonoedge.explain import explain

__all__ = ["Profile", "list_profiles", "load_profile"]

_FOLDER = Path(__file__).parent


def list_profiles() -> list[Profile]:
    """Return the packaged profiles in the order of their ids."""
    return [_read(path) for path in sorted(_FOLDER.glob("*.toml"))]


def load_profile(id_or_path: str | Path) -> Profile:
    """Return a packaged profile by its id, or the user's own by the path of a TOML file.

    Raises SonoEdgeError for an unknown id (listing the known ones), and naming file, key and value for a wrong file.
    """
    text = str(id_or_path)
    if text.endswith(".toml") or "/" in text:
        return _read(Path(id_or_path))
    known = sorted(path.stem for path in _FOLDER.glob("*.toml"))
    if text not in known:
        raise SonoEdgeError(f"unknown profile {text!r}: choose {', '.join(known)}, or name a TOML file of your own")
    return _read(_FOLDER / f"{text}.toml")


def _read(path: Path) -> Profile:
    raw: object = None
    try:
        raw = msgspec.toml.decode(path.read_bytes())
        profile = msgspec.convert(raw, Profile)
        check_agreement(profile)
        check_sources(profile)
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): name a profile, or a TOML file") from error
    except msgspec.ValidationError as error:
        raise SonoEdgeError(f"{path}: {explain(str(error), raw)}: correct the file") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{path} is not TOML ({error}): correct the file") from error
    except SonoEdgeError as error:
        raise SonoEdgeError(f"{path}: {error}") from error
    return profile
