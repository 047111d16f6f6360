"""What every graph pass is: a transformation of one graph that checks what it requires before and ensures after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import onnx_ir as ir

from sonoedge.export.markers import DOMAIN


class PassError(Exception):
    """A pass met a graph that it does not understand, or left one that breaks its promise: a defect, never the user's."""


class Pass(ABC):
    """One transformation, in place."""

    def requires(self, model: ir.Model) -> None:
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
        name = type(step).__name__
        for stage in (step.requires, step.apply, step.ensures):
            try:
                stage(model)
            except PassError as error:
                raise PassError(f"{name}.{stage.__name__} after {', '.join(done) or 'the export'}: {error}") from error
        done.append(name)


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
