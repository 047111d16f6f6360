"""Pass: every initializer without a value points at its bytes in the weights file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sonoedge.export.layout import Layout
from sonoedge.export.passes.base import Pass, PassError
from sonoedge.export.passes.views import stored_name, view


class AttachWeights(Pass):
    """Requires: initializers without a value bear names of the layout. Ensures: every one has a value, none is idle.

    The file need not be written yet.
    """

    def __init__(self, layout: Layout, file: Path) -> None:
        self._layout, self._file = layout, file

    def requires(self, model: ir.Model) -> None:
        used = _used(model)
        for name in [name for name in model.graph.initializers if name not in used]:
            del model.graph.initializers[name]
        for name, value in model.graph.initializers.items():
            if value.const_value is None and stored_name(name) not in self._layout.tensors:
                raise PassError(f"the layout has no {name}")

    def apply(self, model: ir.Model) -> None:
        for name, value in model.graph.initializers.items():
            if value.const_value is not None:
                continue
            seen = view(name, self._layout.tensors[stored_name(name)])
            assert value.dtype is not None  # given when it was made
            value.shape = ir.Shape(seen.shape)
            value.const_value = ir.ExternalTensor(
                self._file.name,
                seen.offset,
                seen.length,
                value.dtype,
                shape=ir.Shape(seen.shape),
                name=name,
                base_dir=self._file.parent,
            )

    def ensures(self, model: ir.Model) -> None:
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                raise PassError(f"{name} has no value")


def _used(model: ir.Model) -> set[str]:
    """Names of the values that something reads."""
    return {str(value.name) for node in model.graph for value in node.inputs if value is not None}
