"""What every decoder layer makes of a sequence: hidden states and router logits, of the torch model and of a graph.

The graph is the very file that is shipped: a copy whose probed values are outputs too lies beside its weights for as
long as it takes to load.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.metrics import Floats
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.runtime.look import Prompt
from sonoedge.runtime.sessions.masks import attention_bias
from sonoedge.runtime.sessions.ort import load_graph

PROBE = re.compile(r"probe\.(hidden|router)\.(\d+)")  # values of a decoder graph, by layer


class Trace(msgspec.Struct, frozen=True):
    """One sequence as the layers saw it."""

    hidden: tuple[Floats, ...]  # the output of each layer, [s, hidden]
    router: tuple[Floats, ...]  # the router logits of each layer with experts, [s, experts]


class Probe(Protocol):
    """A decoder that shows what its layers compute."""

    def trace(self, prompt: Prompt) -> Trace:
        """Run the whole sequence with an empty cache."""
        ...


class TorchProbe:
    """The torch model's layers."""

    def __init__(self, model: EchoVLM) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def trace(self, prompt: Prompt) -> Trace:
        hidden: list[Floats] = []
        router: list[Floats] = []

        def keep(_layer: nn.Module, _inputs: object, outputs: tuple[Tensor, Tensor | None]) -> None:
            hidden.append(outputs[0][0].float().numpy())
            if outputs[1] is not None:
                router.append(outputs[1][0].float().numpy())

        hooks = [layer.register_forward_hook(keep) for layer in self._model.model.layers]
        try:
            self._model(
                torch.tensor(prompt.ids)[None],
                torch.tensor(prompt.positions)[:, None],
                image_embeds=torch.tensor(prompt.embeds) if len(prompt.embeds) else None,
                logits_rows=torch.tensor([0]),
            )
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(tuple(hidden), tuple(router))


class OrtProbe:
    """The layers of a decoder graph, run by ONNX Runtime as it is served; keeps the weights in memory once more."""

    def __init__(self, decoder: Path, *, threads: int) -> None:
        """Load the graph; raises SonoEdgeError when it names no probed value, or nothing can be written beside it."""
        model = onnx.load(decoder, load_external_data=False)
        found = [match for node in model.graph.node for name in node.output if (match := PROBE.fullmatch(name))]
        if not found:
            raise SonoEdgeError(f"{decoder} names no value probe.hidden.N: export the decoder again")
        by_layer = sorted(found, key=lambda match: (match[1], int(match[2])))
        self._hidden = [match[0] for match in by_layer if match[1] == "hidden"]
        self._router = [match[0] for match in by_layer if match[1] == "router"]
        outputs = {output.name for output in model.graph.output}
        for name in (*self._hidden, *self._router):
            if name not in outputs:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self._session: Any = _loaded_beside(model, decoder, threads)
        self._inputs = {given.name for given in self._session.get_inputs()}
        self._past = dict(_empty_cache(self._session.get_inputs()))

    def trace(self, prompt: Prompt) -> Trace:
        tokens = len(prompt.ids)
        feed: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": prompt.ids[None],
            "positions": prompt.positions[:, None],
            "image_embeds": prompt.embeds,
            "attention_bias": attention_bias(np.tri(tokens, dtype=np.bool_), np.arange(tokens), (tokens, tokens)),
            "logits_rows": np.array([tokens - 1]),
            "last_token": np.array([tokens - 1], np.int32),
            "total_tokens": np.array(tokens, np.int32),
        }
        given = {name: array for name, array in feed.items() if name in self._inputs}
        values: list[Floats] = self._session.run([*self._hidden, *self._router], given | self._past)
        layers = tuple(value[0] for value in values)
        return Trace(layers[: len(self._hidden)], layers[len(self._hidden) :])

    def close(self) -> None:
        """Free the graph."""
        del self._session


def _loaded_beside(model: onnx.ModelProto, decoder: Path, threads: int) -> Any:
    """A session on `model`, whose weights are files named relative to the folder of `decoder`."""
    try:
        with tempfile.NamedTemporaryFile(dir=decoder.parent, prefix=".probe-", suffix=".onnx") as copy:
            copy.write(model.SerializeToString())
            copy.flush()
            return load_graph(Path(copy.name), threads)
    except OSError as error:
        raise SonoEdgeError(
            f"no probed copy of {decoder.name} can be written to {decoder.parent} ({error.strerror}): make room there"
        ) from error


def _empty_cache(inputs: Iterable[Any]) -> Iterable[tuple[str, npt.NDArray[np.generic]]]:
    """A cache without tokens for each `past_…` input: its whole capacity where the graph has one, else no rows."""
    for given in inputs:
        if given.name.startswith("past_"):
            shape = [size if isinstance(size, int) else 0 for size in given.shape]
            yield given.name, np.zeros(shape, np.int8 if given.type == "tensor(int8)" else np.float32)
