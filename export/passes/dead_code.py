"""Pass: what nothing reads goes, such as routing weights beside plugins that route by themselves."""

from __future__ import annotations

import onnx_ir as ir

from sonoedge.export.passes.base import Pass, PassError


class RemoveUnused(Pass):
    """Ensures: every node has an output that another node or the graph's caller reads."""

    def apply(self, model: ir.Model) -> None:
        kept = set(model.graph.outputs)
        for node in reversed(model.graph):  # readers come after what they read
            if not any(output in kept or output.uses() for output in node.outputs):
                model.graph.remove(node, safe=True)

    def ensures(self, model: ir.Model) -> None:
        kept = set(model.graph.outputs)
        for node in model.graph:
            if not any(output in kept or output.uses() for output in node.outputs):
                raise PassError(f"{node.name} is read by nothing")
