"""Plays clips through a bundle as a scanner and a client would: a server process, hints and answers over ZeroMQ."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import Truth, phantom_clip
from sonoedge.calibration.phantom.frame import Kind
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.preprocess import crop_to_sector
from sonoedge.runtime.protocol import Answer, Hint
from sonoedge.runtime.sources import open_source

HINTED_FRAMES = 24  # a clip is watched until this many of its frames have hints
SILENCE_S = 30.0


class Clip(msgspec.Struct, frozen=True):
    """A feed with its frames, and the truth of each where it is known."""

    name: str
    source: str
    images: tuple[npt.NDArray[np.uint8], ...]  # frames [H, W, 3], as the feed counts them
    truths: tuple[Truth, ...] = ()


class Played(msgspec.Struct, frozen=True):
    """What was heard while a clip played."""

    clip: Clip
    hints: tuple[Hint, ...]
    answers: tuple[tuple[str, Answer], ...]  # with the question of each


def real_clip() -> Clip:
    """The SonoSite cardiac clip that pydicom carries in its wheel."""
    from pydicom.data import get_testdata_file

    path = get_testdata_file("examples_ybr_color.dcm", download=False)
    if path is None:
        raise SonoEdgeError(
            "pydicom's wheel lacks examples_ybr_color.dcm: install the pinned version from constraints.txt"
        )
    source = open_source(str(path), once=True, fps=1000.0)
    images = tuple(crop_to_sector(frame) for frame in source)  # what the model sees
    source.close()
    return Clip("real clip: SonoSite, heart (pydicom examples_ybr_color.dcm)", str(path), images)


def phantom_feed(region: str, kind: Kind, seed: int, folder: Path, frames: int = 60) -> Clip:
    """A moving phantom as a folder of pictures."""
    folder.mkdir(parents=True)
    made = list(phantom_clip(seed, frames, region=region, kind=kind))
    for index, frame in enumerate(made):
        cv2.imwrite(str(folder / f"{index:04d}.png"), frame.image)
    images, truths = tuple(frame.image for frame in made), tuple(frame.truth for frame in made)
    return Clip(f"phantom: {region}", str(folder), images, truths)


def play(bundle: Path, clip: Clip, questions: Sequence[str]) -> Played:
    """Serve the clip in a process of its own, gather the hints of its first frames and ask the questions meanwhile."""
    with served(bundle, clip.source) as ready:
        hints = tuple(_hints(ready["hints_bind"]))
        with Client(ready["bind"], timeout_s=SILENCE_S) as client:
            answers = tuple((question, client.answer(question)) for question in questions)
    return Played(clip, hints, answers)


def _hints(endpoint: str) -> Iterator[Hint]:
    frames: set[int] = set()
    for message in listen(endpoint, timeout_s=SILENCE_S):
        if isinstance(message, Hint):
            if message.frame not in frames and len(frames) == HINTED_FRAMES:
                return
            frames.add(message.frame)
            yield message


@contextmanager
def served(bundle: Path, source: str) -> Iterator[dict[str, str]]:
    """Run `sonoedge serve` on free loopback ports; yields its ready line, and ends it with Ctrl-C's signal."""
    command = [sys.executable, "-m", "sonoedge", "serve", str(bundle), "--source", source, "--json"]
    command += ["--bind", "tcp://127.0.0.1:*", "--hints-bind", "tcp://127.0.0.1:*"]
    command += ["--allow-untrusted"]  # made a moment ago, maybe on an account that can keep no key
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # asked for above
        try:
            line = process.stdout.readline()
            ready = json.loads(line) if line else {"error": f"it ended with status {process.wait()}"}
            if "error" in ready:
                raise SonoEdgeError(f"the server for {source} did not start: {ready['error']}")
            yield ready
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate()  # its summary is read, so that it does not write into a closed pipe
