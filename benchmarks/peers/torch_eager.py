"""The same EchoVLM in PyTorch, eager, with a KV cache and only the chosen experts computed, as the reference has it."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import torch

from benchmarks.command_line import run
from benchmarks.environments import Peer
from benchmarks.worker import Facts, LanguageModel, prompt_ids
from sonoedge.export.make_checkpoint import named_config
from sonoedge.export.models.cache import KVCache
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.routed_moe import RoutedMoE

PEER = Peer(title="PyTorch", module="benchmarks.peers.torch_eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANDOM_VALUES = 1 << 20  # drawn once and repeated: drawing a billion takes longer than measuring


class Options(msgspec.Struct, frozen=True):
    """Which shape in which precision."""

    config: str  # packaged name, or path of a config.json
    dtype: str = "float32"


class TorchModel(LanguageModel):
    """The model with random weights, one token or one prompt a call."""

    def __init__(self, options: Options, threads: int) -> None:
        torch.set_num_threads(threads)
        self._dtype = DTYPES[options.dtype]
        self._model = with_routed_experts(random_model(options.config, self._dtype))
        self._cache = KVCache(self._model.config.num_hidden_layers)
        size = sum(parameter.nbytes for parameter in self._model.parameters())
        self.facts = Facts(f"torch {torch.__version__}, {options.dtype}", size)

    def decode(self, prompt: int, tokens: int) -> float:
        """Time `tokens` greedy steps after `prompt` tokens."""
        self._cache = KVCache(self._model.config.num_hidden_layers)
        token = self._run(prompt_ids(prompt, self._model.config.vocab_size))
        token = self._run([token])
        began = time.perf_counter()
        for _ in range(tokens):
            token = self._run([token])
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Time one pass over `tokens` tokens."""
        self._cache = KVCache(self._model.config.num_hidden_layers)
        ids = prompt_ids(tokens, self._model.config.vocab_size)
        began = time.perf_counter()
        self._run(ids)
        return time.perf_counter() - began

    @torch.no_grad()
    def _run(self, ids: list[int]) -> int:
        """Append tokens and return the likeliest next one."""
        length = self._cache.length
        positions = torch.arange(length, length + len(ids)).expand(3, 1, -1)
        last = torch.tensor([len(ids) - 1])
        logits = self._model(torch.tensor([ids]), positions, cache=self._cache, logits_rows=last).logits
        # An image token in an answer would ask for an image: the half that prompts come from holds none.
        return int(logits[0, 0, : self._model.config.vocab_size // 2].argmax())


def random_model(config: str, dtype: torch.dtype) -> EchoVLM:
    """The packaged or given config with random weights, matrices at 1 / √inputs, norms one, biases zero."""
    model = empty_model(named_config(config)).to(dtype).to_empty(device="cpu").eval()
    values = torch.randn(RANDOM_VALUES, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            inputs = parameter[0].numel()
            for part in parameter.view(-1).split(RANDOM_VALUES):
                part.copy_(values[: part.numel()])
            parameter.mul_(inputs**-0.5)
    return model


def with_routed_experts(model: EchoVLM) -> EchoVLM:
    """The model with mixtures that run each chosen expert on its own tokens alone; it gives the same logits."""
    for layer in model.model.layers:
        owner: Any = layer
        if model.config.moe is not None:
            with torch.device("meta"):
                routed = RoutedMoE(model.config.hidden_size, model.config.moe)
            routed.load_state_dict(owner.moe.state_dict(), assign=True)
            owner.moe = routed
    return model


if __name__ == "__main__":
    run(PEER, Options, TorchModel)
