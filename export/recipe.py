"""The recipe that takes a checkpoint to a bundle: TOML, checked when loaded, hashed into the bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.explain import explain
from sonoedge.export.lowering import Scheme

VERSION = 1
DEFAULT = Path(__file__).parent / "recipes" / "demo.toml"

Seed = Annotated[int, msgspec.Meta(ge=0)]
Least = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Weight = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class StudentShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the student; what is not named stays as in the teacher."""

    vision_layers: Count
    vision_mlp_size: Count
    layers: Count
    intermediate_size: Count
    expert_size: Count
    shared_expert_size: Count


class Distillation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the student learns from the teacher."""

    seed: Seed
    first_frame_seed: Seed
    frames: Count
    vision_steps: int
    steps: Count
    batch: Count
    learning_rate: Positive
    warmup_steps: Least
    temperature: Positive
    answer_weight: Weight
    logits_weight: Weight
    embeds_weight: Weight
    balance_weight: Weight


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which frames give the activation ranges, and how often every expert must have been used."""

    first_frame_seed: Seed
    frames: Count
    least_expert_tokens: Least


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scheme of every product."""

    default: Scheme
    float: tuple[str, ...] = ()

    def scheme(self, name: str) -> Scheme:
        """The scheme of the product called `name`."""
        return Scheme.FLOAT if name.startswith(self.float) else self.default


class Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hints learn when to be silent."""

    first_frame_seed: Seed
    frames: Count
    least_accuracy: Share
    known_share: Share


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the bundle."""

    context: Count
    golden_cases: Count


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything between a checkpoint and a bundle that somebody may choose."""

    version: int
    student: StudentShape
    distill: Distillation
    calibration: Calibration
    quantization: Quantization
    hints: Hints
    limits: Limits

    @property
    def sha256(self) -> str:
        """Content hash, independent of comments and order."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


T = TypeVar("T")


def load_recipe(name_or_path: str | Path | None = None) -> Recipe:
    """Return a packaged recipe by its name, the user's own by the path of a TOML file, or the demo's (None).

    Raises SonoEdgeError naming the packaged ones for an unknown name, and naming file, key and value for a wrong file.
    """
    path = _path_of(name_or_path)
    recipe = read_toml(path, Recipe)
    if recipe.version != VERSION:
        raise SonoEdgeError(
            f"the recipe {path} is wrong: version = {recipe.version}: this SonoEdge reads version {VERSION}"
        )
    return recipe


def read_toml(path: Path, kind: type[T]) -> T:
    """Decode a TOML file as `kind`; raises SonoEdgeError naming the file, the key and the value."""
    raw: object = None
    try:
        raw = msgspec.toml.decode(path.read_bytes())
        return msgspec.convert(raw, kind)
    except OSError as error:
        raise SonoEdgeError(
            f"the recipe {path} cannot be read ({error.strerror}): give the path of a TOML file"
        ) from error
    except msgspec.ValidationError as error:
        raise SonoEdgeError(f"the recipe {path} is wrong: {explain(str(error), raw)}: correct that key") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"the recipe {path} is not TOML ({error}): correct the file") from error


def _path_of(name_or_path: str | Path | None) -> Path:
    if name_or_path is None:
        return DEFAULT
    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text:
        return Path(name_or_path)
    packaged = sorted(path.stem for path in DEFAULT.parent.glob("*.toml"))
    if text not in packaged:
        raise SonoEdgeError(f"unknown recipe {text!r}: choose {', '.join(packaged)}, or name a TOML file of your own")
    return DEFAULT.parent / f"{text}.toml"
