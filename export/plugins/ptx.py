"""What a PTX file's entry is called and takes, and the removal of two pointers that Triton adds to it.

Source: NVIDIA, Parallel Thread Execution ISA (module, kernel and parameter directives).
"""

import re

import msgspec

from sonoedge.errors import SonoEdgeError

_VERSION = re.compile(r"^\.version\s+(\d+)\.(\d+)\s*$", re.MULTILINE)
_TARGET = re.compile(r"^\.target\s+sm_(\d+)([a-z]?)\b", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(
    r"^\.param\s+\.(?P<type>\w+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+(?P<name>[\w$]+)$"
)
_THREADS = re.compile(r"^\.reqntid\s+(\d+)\s*$", re.MULTILINE)

# Workspaces that Triton appends to every kernel: for global scratch memory, and for its profiler.
SCRATCH_POINTERS = 2


class PtxParameter(msgspec.Struct, frozen=True):
    """One parameter of an entry: `type` is PTX's own name, such as u64 for an address."""

    name: str
    type: str


class PtxEntry(msgspec.Struct, frozen=True):
    """The one kernel of a PTX file."""

    name: str
    version: int  # PTX, without the point: 85 is 8.5
    sm: int
    parameters: tuple[PtxParameter, ...]
    threads: int  # of a block; a launch with any other number fails


def read_entry(ptx: str) -> PtxEntry:
    """Read the head of a PTX file; raises SonoEdgeError unless it holds exactly one kernel in Triton's form."""
    entries = list(_ENTRY.finditer(ptx))
    version, target, threads = _VERSION.search(ptx), _TARGET.search(ptx), _THREADS.search(ptx)
    if len(entries) != 1 or version is None or target is None or threads is None:
        raise SonoEdgeError(
            f"a kernel's PTX holds {len(entries)} entries, or lacks .version, .target or .reqntid: compile it again"
        )
    return PtxEntry(
        name=entries[0]["name"],
        version=int(version[1]) * 10 + int(version[2]),
        sm=int(target[1]),
        parameters=tuple(_parameter(entries[0]["name"], text) for text in _split(entries[0]["parameters"])),
        threads=int(threads[1]),
    )


def remove_scratch_pointers(ptx: str) -> str:
    """Return the PTX without the last two parameters of its entry.

    A plugin's launch passes inputs, scalars and outputs and nothing else. PTX reaches a parameter by its name only, so
    one that is named nowhere but in the entry's head is read by no instruction; raises SonoEdgeError for any other.
    """
    entry = read_entry(ptx)
    scratch = entry.parameters[-SCRATCH_POINTERS:]
    if len(scratch) < SCRATCH_POINTERS or any(parameter.type != "u64" for parameter in scratch):
        raise SonoEdgeError(
            f"the kernel {entry.name} does not end in {SCRATCH_POINTERS} pointers: compile it with the Triton version "
            "that constraints.txt names"
        )
    for parameter in scratch:
        if len(re.findall(rf"(?<![\w$]){re.escape(parameter.name)}(?![\w$])", ptx)) != 1:
            raise SonoEdgeError(
                f"the kernel {entry.name} reads {parameter.name}, a workspace that a plugin's launch does not pass: "
                "write the kernel without global scratch memory"
            )
    match = _ENTRY.search(ptx)
    assert match is not None  # read_entry found it
    kept = _split(match["parameters"])[:-SCRATCH_POINTERS]
    head = f".entry {entry.name}(\n\t" + ",\n\t".join(kept) + "\n)"
    return ptx[: match.start()] + head + ptx[match.end() :]


def _split(parameters: str) -> list[str]:
    return [text.strip() for text in parameters.split(",") if text.strip()]


def _parameter(entry: str, text: str) -> PtxParameter:
    match = _PARAMETER.match(text)
    if match is None:
        raise SonoEdgeError(
            f"the kernel {entry} has a parameter {text!r}, neither an address nor a number: write it so"
        )
    return PtxParameter(match["name"], match["type"])
