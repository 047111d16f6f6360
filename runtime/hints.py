"""The hint schema: which questions are asked about every frame, and the only answers each may get."""

import importlib.resources
from pathlib import Path
from typing import Annotated

import msgspec

from sonoedge.errors import SonoEdgeError

SCHEMA_VERSION = 1
VALID_MS = 1000


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same words in both languages."""

    en: str
    zh: str

    def get(self, language: str) -> str:
        """Return the words in `language`; raises SonoEdgeError for a language other than en and zh."""
        if language not in LANGUAGES:
            raise SonoEdgeError(f"there are no hints in language {language!r}: choose one of {', '.join(LANGUAGES)}")
        return self.zh if language == "zh" else self.en


LANGUAGES = Text.__struct_fields__


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer that a hint may have."""

    id: str
    en: str
    zh: str

    @property
    def text(self) -> Text:
        """The answer's words in both languages."""
        return Text(en=self.en, zh=self.zh)


class AskWhen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hint, and its answer, that make a dependent hint worth asking."""

    hint: str
    answer: str = msgspec.field(name="is")


class HintSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One closed question about a frame; its answer is stale when the frame is older than `valid_ms`."""

    name: str
    question: Text
    candidates: tuple[Candidate, ...]
    ask_when: AskWhen | None = None
    valid_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = VALID_MS

    def candidate_ids(self) -> tuple[str, ...]:
        """Return the ids of the candidates, in order."""
        return tuple(candidate.id for candidate in self.candidates)


class HintSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every closed question, in the order in which hints are published."""

    version: int
    hints: tuple[HintSpec, ...] = msgspec.field(name="hint")

    def hint(self, name: str) -> HintSpec:
        """Return the hint called `name`; raises SonoEdgeError when there is none."""
        for hint in self.hints:
            if hint.name == name:
                return hint
        raise SonoEdgeError(f"there is no hint {name!r}: choose one of {', '.join(h.name for h in self.hints)}")


def load_schema(path: Path | str | None = None) -> HintSchema:
    """Read a hint schema, the packaged one by default; raises SonoEdgeError naming the key that is wrong."""
    source = Path(path) if path is not None else importlib.resources.files("sonoedge.runtime") / "hint_schema.toml"
    try:
        schema = msgspec.toml.decode(source.read_bytes(), type=HintSchema)
    except OSError as error:
        raise SonoEdgeError(
            f"the hint schema {source} cannot be read ({error}): give the path of a TOML file"
        ) from error
    except msgspec.DecodeError as error:
        raise SonoEdgeError(f"the hint schema {source} is wrong: {error}; correct that key") from error
    _check(schema, str(source))
    return schema


def _check(schema: HintSchema, source: str) -> None:
    if schema.version != SCHEMA_VERSION:
        raise SonoEdgeError(
            f"{source}: version {schema.version} is not {SCHEMA_VERSION}: update sonoedge or the schema"
        )
    seen: dict[str, HintSpec] = {}
    for hint in schema.hints:
        if hint.name in seen:
            raise SonoEdgeError(f"{source}: hint {hint.name!r} appears twice: rename one")
        ids = hint.candidate_ids()
        if len(ids) < 2 or len(set(ids)) != len(ids):
            raise SonoEdgeError(f"{source}: hint {hint.name!r} has candidates {list(ids)}: give two or more, each once")
        condition = hint.ask_when
        if condition and (condition.hint not in seen or condition.answer not in seen[condition.hint].candidate_ids()):
            raise SonoEdgeError(
                f"{source}: hint {hint.name!r} waits for {condition.hint} = {condition.answer}: "
                "name a hint above it and one of its candidates"
            )
        seen[hint.name] = hint
