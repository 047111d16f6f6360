"""Pass: values that a measurement may ask for get their names."""

from __future__ import annotations

import onnx_ir as ir

from sonoedge.export.passes.base import Pass, PassError, marks, name_of, none_left


class NameProbes(Pass):
    """Requires: `sonoedge::Probe` marks around values. Ensures: no mark is left, the values bear the names."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def requires(self, model: ir.Model) -> None:
        self._names = [name_of(node) for node in marks(model, "Probe")]
        if len(set(self._names)) != len(self._names):
            raise PassError("two probes share a name")

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "Probe"):
            seen, told = node.inputs[0], node.outputs[0]
            assert seen is not None  # a mark has its input
            seen.name = name_of(node)
            ir.convenience.replace_all_uses_with(told, seen)
            model.graph.remove(node, safe=True)

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Probe")
        named = {value.name for node in model.graph for value in node.outputs}
        if missing := set(self._names) - named:
            raise PassError(f"no value is called {sorted(missing)[0]}")
