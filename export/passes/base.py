"""What every graph pass is: a transformation of one graph that checks what it requires before and ensures after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import onnx_ir as ir

from sonoedge.export.markers import DOMAIN


class PassError(Exception):
    """A pass met a graph that it does not understand, or broke its promise: a defect of ours, never the user's."""


class Pass(ABC):
    """One transformation, in place."""

    def requires(self, model: ir.Model) -> None:  # noqa: B027 (a pass without marks to check works on any graph)
        """Raise PassError when the graph is not what this pass works on."""

    @abstractmethod
    def apply(self, model: ir.Model) -> None:
        """Transform."""

    @abstractmethod
    def ensures(self, model: ir.Model) -> None:
        """Raise PassError when the graph is not as promised."""


def run_passes(model: ir.Model, passes: Sequence[Pass]) -> None:
    """Run all passes; a failure names the pass and those before it."""
    done: list[str] = []
    for step in passes:
        _run(step, model, done)
        done.append(type(step).__name__)


def _run(step: Pass, model: ir.Model, done: Sequence[str]) -> None:
    stage = step.requires
    try:
        for stage in (step.requires, step.apply, step.ensures):
            stage(model)
    except PassError as error:
        where = f"{type(step).__name__}.{stage.__name__} after {', '.join(done) or 'the export'}"
        raise PassError(f"{where}: {error}") from error


def marks(model: ir.Model, *kinds: str) -> list[ir.Node]:
    """The nodes of these marks, in the graph's order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type in kinds]


def none_left(model: ir.Model, *kinds: str) -> None:
    """Raise PassError when a mark of these kinds is still there."""
    if left := marks(model, *kinds):
        raise PassError(f"{left[0].op_type} {left[0].attributes['name'].as_string()} is left")


def name_of(node: ir.Node) -> str:
    """What a mark says it is."""
    return node.attributes["name"].as_string()
