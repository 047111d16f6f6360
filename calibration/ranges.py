"""Activation ranges: the largest absolute input that every quantizable product saw, and the tokens that experts got.

optimum's calibrators read ranges from the tensors of an ONNX graph, where the hidden activation of one expert cannot be
told from those of tokens that were never routed to it; here only routed tokens count, so ranges are measured on the
torch model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import msgspec
import torch
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError


class Mixture(Protocol):
    """What the observer needs of a mixture of experts."""

    def gate(self, x: Tensor) -> Tensor:
        """Router logits [..., experts]."""

    def route(self, router_logits: Tensor) -> Tensor:
        """Weight of every expert [..., experts], zero for those not chosen."""

    def expert_hidden(self, x: Tensor) -> Tensor:
        """Input of each expert's down projection [..., experts, intermediate]."""


class RangeTable(msgspec.Struct):
    """What calibration measured."""

    frames: int
    input_maximum: dict[str, float]
    expert_tokens: dict[str, list[int]]

    @property
    def sha256(self) -> str:
        """Content hash: the same inputs give the same table and the same hash."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def require_coverage(self, least: int) -> None:
        """Raise SonoEdgeError naming the first expert that saw fewer than `least` tokens."""
        for name, tokens in self.expert_tokens.items():
            for expert, count in enumerate(tokens):
                if count < least:
                    raise SonoEdgeError(
                        f"calibration gave {name}.{expert} only {count} tokens of the {least} that the recipe asks "
                        "for: calibrate on more, or on more varied, frames"
                    )


@contextmanager
def observe(
    inputs: Mapping[str, nn.Module], outputs: Mapping[str, nn.Module], mixtures: Mapping[str, nn.Module]
) -> Iterator[RangeTable]:
    """Fill the table while the enclosed code runs the model.

    inputs: the first argument of these modules is the input of the product of that name; outputs: their result is.
    mixtures: name of the experts to the module that routes to them. Raises SonoEdgeError naming the product whose
    activations are not finite.
    """
    table = RangeTable(0, {}, {name: [] for name in mixtures})

    def note(name: str, value: Tensor) -> None:
        largest = float(value.detach().abs().max())
        if not math.isfinite(largest):
            raise SonoEdgeError(
                f"the input of {name} is not finite: check the checkpoint's weights and the calibration frames"
            )
        table.input_maximum[name] = max(table.input_maximum.get(name, 0.0), largest)

    def note_input(name: str):  # type: ignore[no-untyped-def]  # torch types its hooks as Callable[..., Any]
        return lambda _module, arguments: note(name, arguments[0])

    def note_output(name: str):  # type: ignore[no-untyped-def]
        return lambda _module, _arguments, result: note(name, result)

    def note_mixture(name: str, mixture: Mixture):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            note(name, x)
            chosen = mixture.route(mixture.gate(x)) > 0  # [..., experts]
            hidden = mixture.expert_hidden(x)  # [..., experts, intermediate]
            counts = table.expert_tokens[name] or [0] * chosen.shape[-1]
            for expert in range(chosen.shape[-1]):
                routed = hidden[..., expert, :][chosen[..., expert]]  # [routed, intermediate]
                counts[expert] += routed.shape[0]
                if routed.shape[0]:
                    note(f"{name}.{expert}.down_proj", routed)
            table.expert_tokens[name] = counts

        return hook

    handles = [module.register_forward_pre_hook(note_input(name)) for name, module in inputs.items()]
    handles += [module.register_forward_hook(note_output(name)) for name, module in outputs.items()]
    handles += [
        module.register_forward_pre_hook(note_mixture(name, module))  # type: ignore[arg-type]  # a SparseMoE is a Mixture
        for name, module in mixtures.items()
    ]
    try:
        with torch.no_grad():
            yield table
    finally:
        for handle in handles:
            handle.remove()
