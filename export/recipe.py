"""The recipe that takes a checkpoint to a bundle: TOML, checked when loaded, hashed into the bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.explain import explain
from sonoedge.export.prune.section import StudentShape as StudentShape  # noqa: PLC0414 (a part of the recipe)
from sonoedge.export.scheme import CacheScheme, Scheme

VERSION = 1
DEFAULT = Path(__file__).parent / "recipes" / "demo.toml"

Seed = Annotated[int, msgspec.Meta(ge=0)]
Least = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Weight = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Distillation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the student learns from the teacher.

    turns: "apart" asks every question of a conversation by itself, as hints are; "in order" lets later ones see earlier
    questions and answers. precision: "bf16" computes in bfloat16 and keeps the student's weights in float32.
    """

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
    hidden_weight: Weight = 0.0  # of matching hidden states through learned projections
    router_weight: Weight = 0.0  # of matching routing likewise
    teacher_layers: tuple[Least, ...] = ()  # matched with each layer of the student; none: evenly spread ones
    top_k: Least = 0  # tokens of the teacher's distribution that are kept, the rest as one; 0: all
    turns: Literal["apart", "in order"] = "apart"
    distinct_draws: Count | None = None  # samples drawn before they come again as they were (None: never)
    accumulate: Count = 1  # passes that a process splits its share of a batch into
    recompute: bool = False  # activations in the backward pass, to save memory
    precision: Literal["f32", "bf16"] = "f32"
    save_every_steps: Count = 100  # the state from which a killed run goes on

    def __post_init__(self) -> None:
        if self.vision_steps > 0 and self.embeds_weight == 0:
            raise ValueError("`vision_steps` match image tokens alone, so `embeds_weight` must not be 0")
        if not any((self.embeds_weight, self.answer_weight, self.logits_weight, self.hidden_weight)):
            raise ValueError(
                "one of `answer_weight`, `logits_weight`, `embeds_weight` and `hidden_weight` must not be 0"
            )


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which frames give the activation ranges, how a range is chosen, and how often every expert must be used."""

    first_frame_seed: Seed
    frames: Count
    least_expert_tokens: Least
    observer: Literal["min-max", "percentile", "entropy", "mse"] = "min-max"
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.99
    smooth: bool = False


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scheme of every product: that of the longest name, or beginning of a name, in `schemes`, else `default`.

    graphs: "speed" keeps weights for many tokens at once and for one token in memory, "memory" one form of them only.
    """

    default: Scheme
    graphs: Literal["speed", "memory"] = "speed"
    cache: CacheScheme = CacheScheme.FLOAT
    schemes: dict[str, Scheme] = {}

    def scheme(self, name: str) -> Scheme:
        """The scheme of the product called `name`."""
        found = [prefix for prefix in self.schemes if name.startswith(prefix)]
        return self.schemes[max(found, key=len)] if found else self.default


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widens the schemes of the most sensitive blocks until the floor is met."""

    frames: Count
    memory_budget_bytes: Count | None = None  # of the weights; None: no limit


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On how many frames INT8 is compared with float, and the floors that a build must hold (None: reported only)."""

    first_frame_seed: Seed
    frames: Count
    least_top1: Share | None = None
    least_answers: Share | None = None
    least_router: Share | None = None
    largest_kl: Positive | None = None
    largest_bleu1_drop: Positive | None = None  # points
    largest_rouge1_drop: Positive | None = None  # points


class Qat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A short quantization-aware pass of the checkpoint against itself in float, on the samples of calibration."""

    seed: Seed
    steps: Count
    batch: Count
    learning_rate: Positive
    warmup_steps: Least
    temperature: Positive


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which experts stay in a bundle for one region; read where `build` is asked for one with --preset.

    "pin" leaves the experts that stay as they are, "merge" lets them take over, by least squares, what the others gave.
    experts: how many stay in each layer; or mass: as many as carry this share of the region's routing in every layer.
    """

    method: Literal["pin", "merge"]
    first_frame_seed: Seed
    frames: Count  # of the region, on which routing is measured; as many of all regions are laid beside them
    compared_frames: Count  # of the region, on which the cost is measured
    experts: Count | None = None
    mass: Share | None = None
    least_answers: Share | None = None  # floors against the model with all experts (None: reported only)
    largest_kl: Positive | None = None

    def __post_init__(self) -> None:
        if (self.experts is None) == (self.mass is None):
            raise ValueError("give one of the keys `experts` and `mass`")


class Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hints learn when to be silent."""

    first_frame_seed: Seed
    frames: Count
    least_accuracy: Share
    known_share: Share
    coverage: Share = 0.98  # of the candidates' sets


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the bundle."""

    context: Count
    golden_cases: Count


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything between a checkpoint and a bundle that somebody may choose; a section that is left out is not done."""

    version: int
    calibration: Calibration
    quantization: Quantization
    limits: Limits
    student: StudentShape | None = None
    distill: Distillation | None = None
    hints: Hints | None = None
    qat: Qat | None = None
    search: Search | None = None
    fidelity: Fidelity | None = None
    preset: Preset | None = None

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
