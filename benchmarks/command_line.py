"""What every peer's module does when it is run: measure that peer alone, or serve a comparison as its worker."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.contenders import Running, Summary, interleave, summarize
from benchmarks.environments import Peer, UnavailableError
from benchmarks.worker import Contender, Decode, Facts, Prefill, protocol_output, serve

Options = TypeVar("Options", bound=msgspec.Struct)
PROMPT_TOKENS, DECODE_TOKENS, PREFILL_TOKENS = 32, 16, 256
THREADS, ROUNDS = 2, 5


class Alone(msgspec.Struct, frozen=True):
    """One peer measured by itself, tokens a second."""

    benchmark: str
    machine: str
    threads: int
    facts: Facts
    decode_tokens_s: Summary
    prefill_tokens_s: Summary


class Skipped(msgspec.Struct, frozen=True):
    """Why a peer was not measured."""

    benchmark: str
    skipped: str


def run(peer: Peer, kind: type[Options], load: Callable[[Options, int], Contender]) -> None:
    """Parse the command line, whose options are the fields of `kind`, and do what it asks."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for field in msgspec.structs.fields(kind):
        default = None if field.required else field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=default)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--worker", metavar="JSON", help="serve tasks from standard input, on a model of these options")
    arguments = vars(parser.parse_args())
    threads, rounds, worker = (arguments.pop(name) for name in ("threads", "rounds", "worker"))
    if worker is not None:
        output = protocol_output()
        serve(load(msgspec.json.decode(worker, type=kind), threads), output)
        return
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        parser.error(f"give --{', --'.join(missing).replace('_', '-')}")
    print(msgspec.json.encode(_alone(peer, kind(**arguments), threads, rounds)).decode())


def machine() -> str:
    """This machine in words."""
    model = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else model}, {os.cpu_count()} processors, {platform.system()}"


def _alone(peer: Peer, options: msgspec.Struct, threads: int, rounds: int) -> Alone | Skipped:
    try:
        running = Running(peer, options, threads)
    except UnavailableError as error:
        return Skipped(peer.title, str(error))
    with running:
        seconds = interleave(
            {
                "decode": lambda: running.seconds(Decode(PROMPT_TOKENS, DECODE_TOKENS)),
                "prefill": lambda: running.seconds(Prefill(PREFILL_TOKENS)),
            },
            rounds,
        )
    return Alone(
        benchmark=peer.title,
        machine=machine(),
        threads=threads,
        facts=running.facts,
        decode_tokens_s=summarize([DECODE_TOKENS / value for value in seconds["decode"]]),
        prefill_tokens_s=summarize([PREFILL_TOKENS / value for value in seconds["prefill"]]),
    )
