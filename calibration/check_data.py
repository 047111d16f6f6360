"""`sonoedge check-data`: what is wrong with data, and what it holds, before hours of training or measuring on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from sonoedge.calibration.case_pictures import read_case_picture
from sonoedge.calibration.conversations import Conversation, each_entry
from sonoedge.calibration.labelled_folder import is_labelled, read_labelled
from sonoedge.calibration.perceptual_hash import NEAR_SLOPES_BITS, NEAR_TERMS_BITS, Hashes, near_groups, perceptual_hash
from sonoedge.calibration.questions import Task, questions
from sonoedge.errors import SonoEdgeError
from sonoedge.progress import track

NEAR = f"near: at most {NEAR_TERMS_BITS} of 63 bits of a pHash and {NEAR_SLOPES_BITS} of 256 bits of a dHash differ"
UNKNOWN = "not said"
SHOWN = 10  # lines of each list on a terminal
FAULTY, MISSING, UNREADABLE, EMPTY = "entry that cannot be used", "missing file", "unreadable picture", "empty answer"
ERRORS = (FAULTY, MISSING, UNREADABLE)
REFUSED = 1


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, and where."""

    data: str
    kind: str
    where: str
    detail: str = ""


class Split(msgspec.Struct, frozen=True):
    """What one set of data holds: counts of cases, of questions by kind and language, of regions and of classes."""

    data: str
    cases: int
    pictures: int
    questions: dict[str, int]
    languages: dict[str, int]
    regions: dict[str, int]  # of cases
    classes: dict[str, int]  # right answers of single choices


class DataCheck(msgspec.Struct, frozen=True):
    """What is wrong with sets of data; a group of near pictures names its files, and their sets where these differ."""

    splits: tuple[Split, ...]
    problems: tuple[Problem, ...]
    duplicates: tuple[tuple[str, ...], ...]  # within a set
    duplicates_across: tuple[tuple[str, ...], ...]
    near: str = NEAR

    @property
    def usable(self) -> bool:
        """Whether nothing stands against training and measuring on these sets."""
        return not self.duplicates_across and not any(problem.kind in ERRORS for problem in self.problems)

    @property
    def summary(self) -> str:
        """All that is wrong, in one line."""
        counts = Counter(problem.kind for problem in self.problems)
        parts = [f"{kind}: {count}" for kind, count in counts.items()]
        if self.duplicates:
            extra = sum(len(group) - 1 for group in self.duplicates)
            parts.append(f"near-duplicate pictures: {extra} beyond the first of their {len(self.duplicates)} groups")
        if self.duplicates_across:
            parts.append(f"groups of near-duplicate pictures in more than one set: {len(self.duplicates_across)}")
        return "; ".join(parts) or "nothing is wrong"


def check_files(paths: Sequence[Path]) -> DataCheck:
    """Check conversation files and labelled folders, each a set such as training or test data.

    Raises SonoEdgeError for a path that is neither, for a file that is no JSON list, and for a set named twice.
    """
    if len(set(paths)) < len(paths):
        raise SonoEdgeError(f"{', '.join(map(str, paths))}: a set is named twice: name each once")
    sets: dict[str, Sequence[Conversation]] = {}
    problems: list[Problem] = []
    for path in paths:
        cases = []
        for index, entry in enumerate(_entries(path)):
            if isinstance(entry, str):
                problems.append(Problem(str(path), FAULTY, f"entry {index}", entry))
            else:
                cases.append(entry)
        sets[str(path)] = cases
    return check_cases(sets, problems)


def check_cases(sets: Mapping[str, Sequence[Conversation]], problems: Sequence[Problem] = ()) -> DataCheck:
    """Check sets of cases by name; `problems` were found while they were read."""
    found = list(problems)
    places: list[tuple[str, str]] = []  # set and path of every hash
    hashes: list[Hashes] = []
    total = sum(len(case.image) for cases in sets.values() for case in cases)
    with track("check the data", total) as advance:
        for name, cases in sets.items():
            for case in cases:
                found += [Problem(name, EMPTY, f"id {case.id!r}") for _, answer in case.exchanges if not answer.strip()]
            for path in dict.fromkeys(path for case in cases for path in case.image):
                advance(1)
                read = _hash(path)
                if isinstance(read, str):
                    found.append(Problem(name, UNREADABLE if Path(path).is_file() else MISSING, path, read))
                else:
                    places.append((name, path))
                    hashes.append(read)
    groups = [[places[index] for index in group] for group in near_groups(hashes) if len(group) > 1]
    return DataCheck(
        tuple(_split(name, cases) for name, cases in sets.items()),
        tuple(found),
        tuple(tuple(path for _, path in group) for group in groups if len({name for name, _ in group}) == 1),
        tuple(tuple(f"{name}: {path}" for name, path in group) for group in groups if len({n for n, _ in group}) > 1),
    )


def run(data: Sequence[Path], as_json: bool) -> int:
    """The verb: exit status 1 where a file is missing or cannot be used, or sets share pictures."""
    found = check_files(data)
    if as_json:
        print(msgspec.json.encode({"usable": found.usable, "summary": found.summary, **_fields(found)}).decode())
    else:
        print_check(found)
    return 0 if found.usable else REFUSED


def print_check(found: DataCheck, console: Console | None = None) -> None:
    """Tables of what the sets hold, then what is wrong, the first ten of each list."""
    out = console or Console()
    table = Table("", *(Path(split.data).name for split in found.splits), title="what the data holds")
    table.add_row("cases", *(f"{split.cases:,}" for split in found.splits))
    table.add_row("pictures", *(f"{split.pictures:,}" for split in found.splits))
    for field in ("questions", "languages", "regions", "classes"):
        counts = [getattr(split, field) for split in found.splits]
        for name in dict.fromkeys(name for count in counts for name in count):
            shares = [
                f"{count.get(name, 0):,} ({count.get(name, 0) / (sum(count.values()) or 1):.0%})" for count in counts
            ]
            table.add_row(f"{field.rstrip('s') if field != 'classes' else 'class'}: {name}", *shares)
    out.print(table)
    for kind in dict.fromkeys(problem.kind for problem in found.problems):
        told = [f"{p.where}{': ' if p.detail else ''}{p.detail}" for p in found.problems if p.kind == kind]
        _list(out, kind, told)
    _list(out, "near-duplicate pictures within a set", [", ".join(group) for group in found.duplicates])
    _list(out, "near-duplicate pictures in more than one set", [", ".join(group) for group in found.duplicates_across])
    out.print(f"{found.summary} ({found.near})", markup=False, highlight=False)


def _list(out: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        out.print(f"{title}: {len(lines)}", markup=False, highlight=False)
        for line in lines[:SHOWN]:
            out.print(f"  {line}", markup=False, highlight=False)
        if len(lines) > SHOWN:
            out.print(f"  … and {len(lines) - SHOWN} more: --json lists all", markup=False, highlight=False)


def _entries(path: Path) -> list[Conversation | str]:
    if path.is_dir():
        if not is_labelled(path):
            raise SonoEdgeError(
                f"{path} is neither a conversation file nor a folder with a folder of pictures for each class: name one"
            )
        return list(read_labelled(path))
    return list(each_entry(path))


def _hash(path: str) -> Hashes | str:
    """The hash of a picture, or why there is none."""
    if not Path(path).is_file():
        return "add it, or remove the case"
    try:
        return perceptual_hash(read_case_picture(Path(path)))
    except SonoEdgeError as error:
        return str(error)


def _split(name: str, cases: Sequence[Conversation]) -> Split:
    asked = [question for case in cases for question in questions(case)]
    chosen = [q.classes[q.right] for q in asked if q.task is Task.DIAGNOSIS and q.right is not None]
    return Split(
        name,
        len(cases),
        len({path for case in cases for path in case.image}),
        dict(Counter(question.kind for question in asked).most_common()),
        dict(Counter(question.language for question in asked).most_common()),
        dict(Counter(case.shown or UNKNOWN for case in cases).most_common()),
        dict(Counter(chosen).most_common()),
    )


def _fields(found: DataCheck) -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__struct_fields__}
