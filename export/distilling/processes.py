"""Several processes as one run: one of them speaks, each waits for the others, and none waits for the dead."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from io import StringIO
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sonoedge.errors import SonoEdgeError
from sonoedge.refusals import sentence

PATIENCE = timedelta(minutes=30)  # with a process that neither answers nor ends; a dead one is noticed at once
REFUSED = 2
_LOST = ("closed by peer", "reset by peer", "gloo", "broken pipe", "connect")  # in what torch raises for a dead peer


def join() -> Accelerator:
    """This process's part in the run that `accelerate launch` started; the only process where nothing did."""
    # Parts of the student rest while vision alone is trained.
    parameters = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[parameters, InitProcessGroupKwargs(timeout=PATIENCE)]
    )


class Stopped(BaseException):
    """The launcher told this process to end, as it does when another one died."""


@contextmanager
def one_voice(accelerator: Accelerator) -> Iterator[None]:
    """Tell one refusal for all processes: the first that has one raises it, the others end with status 2.

    A process that loses another, or that the launcher ends because another died, refuses in one sentence too.
    """
    if accelerator.num_processes == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    quiet = StringIO() if not accelerator.is_main_process else sys.stderr
    try:
        with redirect_stderr(quiet):
            yield
    except Stopped as error:
        _refuse(_died(), error)
    except Exception as error:
        told = SonoEdgeError(text) if (text := sentence(error)) is not None else None
        if told is None and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST):
            told = _died()
        if told is None:
            raise
        _refuse(told, error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _died() -> SonoEdgeError:
    return SonoEdgeError(
        "a process of this run died, so all end: what was saved last is kept, run the same command again to go on"
    )


def _refuse(told: SonoEdgeError, error: BaseException) -> None:
    if _first_to_speak():
        raise told from error
    raise SystemExit(REFUSED) from error


def _first_to_speak() -> bool:
    """Whether no other process has refused yet; where that cannot be asked any more, better twice than never."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001 (torch has no public name for it)
        return bool(store.add("sonoedge-refused", 1) == 1)
    except (RuntimeError, ValueError):
        return True


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (what a signal handler is given)
    raise Stopped
