"""Keeps what a builder says: its errors, the layers of what it built, the memory that running it takes."""

import re
from typing import Any

import msgspec

_KEPT_ERRORS = 20
_LAYERS = "Layers:\n"
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")


class Record(msgspec.Struct):
    """What was kept; `layers` is the builder's own listing, one line a layer."""

    errors: list[str] = []
    layers: str = ""
    activation_bytes: list[int] = []  # one for each optimization profile

    def take(self, severity: str, message: str) -> None:
        """Keep the message when it is of use; never raises, since it is called from inside the builder."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if len(self.errors) < _KEPT_ERRORS:
                self.errors.append(" ".join(message.split()))
        elif message.startswith(_LAYERS):
            self.layers = message[len(_LAYERS) :]
        elif found := _ACTIVATIONS.match(message):
            self.activation_bytes.append(int(found[1]))


def make_logger(module: Any, record: Record) -> Any:
    """A logger of the builder's library that keeps what is of use, and prints nothing."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            record.take(severity.name, message)

    return Logger()
