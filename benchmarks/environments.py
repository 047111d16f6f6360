"""Virtual environments of peers, made under build/peers/ the first time a peer is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "peers"
INSTALLED = ".installed"  # in an environment: the packages that it was completed with
MSGSPEC = f"msgspec=={msgspec.__version__}"  # both ends of a pipe speak through it


class UnavailableError(Exception):
    """A peer cannot run on this machine; the message is the reason."""


class Peer(msgspec.Struct, frozen=True):
    """One thing to measure: a module with a worker, and what it needs installed."""

    title: str
    module: str
    packages: tuple[str, ...] = ()  # for pip, into an environment of its own; none: the project's environment
    tools: tuple[str, ...] = ()  # programs that building the packages needs
    build_settings: dict[str, str] = {}  # environment variables while they are built


def interpreter(peer: Peer) -> Path:
    """The Python that runs `peer`, its packages installed; raises UnavailableError when they cannot be."""
    if not peer.packages:
        return Path(sys.executable)
    folder = FOLDER / peer.module.rpartition(".")[2]
    python, marker = folder / "bin" / "python", folder / INSTALLED
    wanted = "\n".join((MSGSPEC, *peer.packages))
    if marker.is_file() and marker.read_text() == wanted:
        return python
    missing = [tool for tool in peer.tools if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} must be installed to build {', '.join(peer.packages)}")
    print(f"installing {', '.join(peer.packages)} into {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
    marker.unlink(missing_ok=True)
    venv.create(folder, clear=True, symlinks=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", MSGSPEC, *peer.packages]
    done = subprocess.run(command, env=os.environ | peer.build_settings, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        told = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise UnavailableError(f"pip could not install it: {told[-1].strip() if told else 'it said nothing'}")
    marker.write_text(wanted)
    return python
