"""The verb `audit`: is the log whole and unchanged, and what does it say?"""

import datetime
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.audit_chain import (
    FIRST,
    Begin,
    Damage,
    Head,
    Record,
    line_hash,
    parse_head,
    read_head,
    read_parts,
    read_records,
    segments,
)

CHANGED = 1  # exit status of a log that does not verify


class AuditReport(msgspec.Struct, frozen=True):
    """What was found: `problems` are signs of tampering or loss, `notes` what a crash or the bound explain."""

    verified: bool
    files: int
    records: int
    first: int | None  # number of the oldest record that is kept
    last: int | None
    head: str | None  # SEQ:SHA256 of the newest record
    problems: list[str]
    notes: list[str]


def verify(folder: Path, head: Head | None = None) -> AuditReport:
    """Check every link of the chain; `head` is where it is known to have stood. Raises SonoEdgeError without a log.

    Whoever can write the folder could make a whole new chain: only a head that was noted elsewhere tells that.
    """
    files = _files(folder)
    problems: list[str] = []
    notes: list[str] = []
    damages: list[Damage] = []
    begins: list[Begin] = []
    wanted = {known for known in (head, read_head(folder)) if known is not None and known.seq}
    before = first = None
    records = 0
    for path in files:
        for part in read_parts(path):
            if isinstance(part, Damage):
                damages.append(part)
                continue
            line, record = part
            if first is None:
                first = record
            elif before is not None and record.seq != before.seq + 1:
                problems.append(f"{path.name}: record {record.seq} comes after {before.seq}: some are missing or moved")
            elif before is not None and record.previous != before.sha256:
                problems.append(f"{path.name}: record {before.seq} was changed, or {record.seq} does not follow it")
            if record.kind == "begin" and (begin := _begin(record)) is not None:
                begins.append(begin)
            before = Head(record.seq, line_hash(line))
            wanted.discard(before)
            records += 1
    if damages and _ends(files[-1], damages[-1]):
        notes.append(f"{_where(damages.pop())}: the process ended while it wrote")
    _judge_damage(damages, begins, problems, notes)
    _judge_start(first, begins, problems, notes)
    problems += [f"record {begin.missing.seq} was lost before a start" for begin in begins if begin.missing is not None]
    problems += [f"record {known.seq} is not there as it was once written" for known in wanted]
    return AuditReport(
        verified=not problems,
        files=len(files),
        records=records,
        first=None if first is None else first.seq,
        last=None if before is None else before.seq,
        head=None if before is None else f"{before.seq}:{before.sha256}",
        problems=problems,
        notes=notes,
    )


def run_verify(folder: Path, head: str | None, as_json: bool) -> int:
    """Report whether the log is whole and unchanged; exit status 1 when it is not."""
    report = verify(folder, None if head is None else parse_head(head))
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        for line in (*report.problems, *report.notes):
            print(line)
        verdict = "whole and unchanged" if report.verified else f"{len(report.problems)} problems"
        print(f"{folder}: {report.records} records in {report.files} files, {verdict}; head {report.head}")
    return 0 if report.verified else CHANGED


def run_show(folder: Path, kind: str | None, last: int | None, as_json: bool) -> None:
    """Print records, oldest first: all, or the `last` ones, of one kind."""
    chosen = [record for record in _records(folder) if kind in (None, record.kind)]
    for record in chosen if last is None else chosen[-last:]:
        if as_json:
            print(msgspec.json.encode(record).decode())
            continue
        when = datetime.datetime.fromtimestamp(record.wall_ns / 1e9, datetime.timezone.utc)
        fields = msgspec.json.encode(record.fields).decode()
        print(f"{record.seq}  {when.isoformat(timespec='milliseconds')}  {record.kind}  {fields}")


def _records(folder: Path) -> Iterator[Record]:
    for path in _files(folder):
        yield from (record for _, record in read_records(path))


def _files(folder: Path) -> list[Path]:
    if not (files := segments(folder)):
        raise SonoEdgeError(f"{folder} holds no audit log: name the folder that `serve` was given with --audit")
    return files


def _begin(record: Record) -> Begin | None:
    """What a process said at its start; None when that was made unreadable, which breaks the chain as well."""
    try:
        return msgspec.convert(record.fields, Begin)
    except msgspec.ValidationError:
        return None


def _judge_damage(damages: list[Damage], begins: list[Begin], problems: list[str], notes: list[str]) -> None:
    """What a killed process left is told by the next one; all else is tampering."""
    told = {known for begin in begins for known in begin.damaged}
    for found in damages:
        if found in told:
            notes.append(f"{_where(found)}: the process ended while it wrote")
        else:
            problems.append(f"{_where(found)}: they were changed or added")


def _ends(newest: Path, found: Damage) -> bool:
    """Whether it is one unfinished line at the very end, which the next process will tell."""
    data = newest.read_bytes()
    return found.file == newest.name and found.offset + found.bytes == len(data) and b"\n" not in data[found.offset :]


def _where(found: Damage) -> str:
    return f"{found.file}: {found.bytes} bytes after byte {found.offset} are no record"


def _judge_start(first: Record | None, begins: list[Begin], problems: list[str], notes: list[str]) -> None:
    """The oldest record is the very first, or a later one tells that those before it were dropped for the bound."""
    if first is None or (first.seq == 1 and first.previous == FIRST):
        return
    ends = {(dropped.seq, dropped.sha256) for begin in begins for dropped in begin.dropped}
    if (first.seq - 1, first.previous) in ends:
        notes.append(f"records before {first.seq} were dropped to keep the log within its size")
    else:
        problems.append(f"the records before {first.seq} are gone, and not because of the log's size")
