"""The audit log on disk: numbered files of JSON lines, each holding the SHA-256 of the line before it.

000001.jsonl, 000002.jsonl, …   the records, oldest first; every file begins with a `begin` record
head.json                       the newest record that has surely reached the disk
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from sonoedge.errors import SonoEdgeError

HEAD_FILE = "head.json"
FIRST = "0" * 64  # what the very first record holds in place of a hash


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line. `seq` counts without gaps, whatever the clocks do."""

    seq: int
    wall_ns: int  # since 1970, as the machine's clock had it
    mono_ns: int  # on the clock of `captured_ns`, which nobody can set
    kind: str
    fields: dict[str, Any]
    previous: str  # SHA-256 of the line before, without its newline


class Damage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that are no record, from byte `offset` of a file; a process tells those after which it goes on."""

    file: str
    offset: int
    bytes: int
    sha256: str


class Dropped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An oldest file that made room for newer records, and where the chain stood at its end."""

    file: str
    seq: int
    sha256: str


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the chain stands: a record's number and the SHA-256 of its line."""

    seq: int = 0
    sha256: str = FIRST


class Begin(msgspec.Struct, frozen=True):
    """The fields of a `begin` record that verification needs."""

    dropped: tuple[Dropped, ...] = ()
    damaged: tuple[Damage, ...] = ()
    missing: Head | None = None  # the head was here once and is not in the files any more


_records = msgspec.json.Decoder(Record)


def line_hash(line: bytes) -> str:
    """Return the SHA-256 of a line without its newline."""
    return hashlib.sha256(line).hexdigest()


def decode_line(line: bytes) -> Record | None:
    """Return the record, None when the line is not one."""
    try:
        return _records.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def segment_name(number: int) -> str:
    """Return the name of a file of records."""
    return f"{number:06d}.jsonl"


def segments(folder: Path) -> list[Path]:
    """Return the files of records, oldest first."""
    return sorted((path for path in folder.glob("*.jsonl") if path.stem.isdigit()), key=lambda path: int(path.stem))


def read_parts(path: Path) -> Iterator[tuple[bytes, Record] | Damage]:
    """Yield every record with its line (without newline), and what stands between, before and after them."""
    data = path.read_bytes()
    begin = bad_from = 0
    while begin < len(data):
        end = data.find(b"\n", begin)
        record = decode_line(data[begin:end]) if end >= 0 else None
        if record is not None:
            if bad_from < begin:
                yield damage(path.name, bad_from, data[bad_from:begin])
            yield data[begin:end], record
            bad_from = end + 1
        begin = end + 1 if end >= 0 else len(data)
    if bad_from < len(data):
        yield damage(path.name, bad_from, data[bad_from:])


def read_records(path: Path) -> list[tuple[bytes, Record]]:
    """Return every record of a file with its line, whatever else is there."""
    return [part for part in read_parts(path) if not isinstance(part, Damage)]


def read_end(path: Path) -> tuple[bytes | None, Damage | None]:
    """Return the last line that is a record, and what comes after it; None each where there is none."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1  # after the last whole line
    line = None
    while end:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        if decode_line(data[begin : end - 1]) is not None:
            line = data[begin : end - 1]
            break
        end = begin
    return line, damage(path.name, end, data[end:]) if end < len(data) else None


def damage(file: str, offset: int, data: bytes) -> Damage:
    """Describe bytes that are no record."""
    return Damage(file, offset, len(data), line_hash(data))


def read_head(folder: Path) -> Head | None:
    """Return what the head file says, None when there is none or it cannot be read."""
    try:
        return msgspec.json.decode((folder / HEAD_FILE).read_bytes(), type=Head)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def parse_head(text: str) -> Head:
    """Read `SEQ:SHA256`, as `sonoedge audit verify` prints it."""
    seq, _, sha256 = text.partition(":")
    if not seq.isdigit() or len(sha256) != 64:
        raise SonoEdgeError(f"{text!r} is no head of a log: give what `sonoedge audit verify` printed, like 12:ab34…")
    return Head(int(seq), sha256)
