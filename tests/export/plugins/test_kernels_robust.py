"""Kernels give the same bits each run, keep to their memory whatever the logits, compile after being interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sonoedge.export.plugins import dispatch
from sonoedge.export.plugins.dispatch import Experts

Run = Callable[..., list[Tensor]]

EXPERTS = Experts(experts=5, chosen=2, hidden=48, inner=80, norm_topk_prob=True, block_rows=16)
TOKENS = {"prefill": 37, "decode": 5}


@pytest.fixture(scope="module")
def chain(interpret: Any) -> Run:
    """Outputs of a whole phase, operator by operator, on inputs whose float32 sums do round."""

    def run(phase: str, logits: Tensor | None = None, *, backwards: bool = False) -> list[Tensor]:
        tokens = TOKENS[phase]
        seeded = torch.Generator().manual_seed(5)
        given = torch.randn(tokens, 5, generator=seeded) if logits is None else logits
        known: dict[str, Tensor] = {
            "x": torch.randn(tokens, 48, generator=seeded).half(),
            "logits": given,
            "input_scale": torch.tensor([0.03]),
            "hidden_scale": torch.rand(5, generator=seeded) / 50,
            "gate_up_values": torch.randint(-127, 128, (5, 160, 48), generator=seeded, dtype=torch.int8),
            "gate_up_scale": torch.rand(5, 160, generator=seeded) / 200,
            "down_values": torch.randint(-127, 128, (5, 48, 80), generator=seeded, dtype=torch.int8),
            "down_scale": torch.rand(5, 48, generator=seeded) / 200,
        }
        found = []
        for kernel in dispatch.PREFILL if phase == "prefill" else dispatch.DECODE:
            inputs = [known[buffer.name] for buffer in kernel.inputs]
            results = interpret(kernel.operator, EXPERTS, inputs, tokens, backwards=backwards)
            known |= dict(zip((buffer.name for buffer in kernel.outputs), results, strict=True))
            found += results
        return found

    return run


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_same_bits_in_every_run_and_in_any_order_of_programs(chain: Run, phase: str) -> None:
    first, *others = chain(phase), chain(phase), chain(phase, backwards=True)
    assert torch.isfinite(first[-1]).all()
    for other in others:
        for left, right in zip(first, other, strict=True):
            assert left.numpy().tobytes() == right.numpy().tobytes()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_token_of_wrong_logits_spoils_itself_alone(chain: Run, phase: str, wrong: float) -> None:
    logits = torch.randn(TOKENS[phase], 5, generator=torch.Generator().manual_seed(6))
    right = chain(phase, logits)[-1]
    logits[3] = torch.full((5,), wrong)
    logits[4, 1] = wrong
    found = chain(phase, logits)  # between guards: nothing was written beside the buffers
    if phase == "prefill":
        slot_token, token_slot = found[2], found[4]
        assert (slot_token < TOKENS[phase]).sum() == TOKENS[phase] * EXPERTS.chosen
        assert torch.equal(
            slot_token[token_slot.long()], torch.arange(TOKENS[phase], dtype=torch.int32)[:, None].expand(-1, 2)
        )
    spoilt = found[-1]
    assert torch.isnan(spoilt[3]).all()
    if wrong != -float("inf"):  # one expert that nobody would take is nothing wrong
        assert torch.isnan(spoilt[4]).all()
    others = [token for token in range(TOKENS[phase]) if token not in (3, 4)]
    assert torch.equal(spoilt[others], right[others])


def test_compiling_works_after_interpreting(chain: Run) -> None:
    from triton.runtime.jit import JITFunction

    from sonoedge.export.plugins import decode, prefill, routing
    from sonoedge.export.plugins.compile import Source, compile_source

    chain("decode")
    for module, name in ((prefill, "expert_up"), (decode, "expert_up_decode"), (routing, "takes_expert")):
        assert isinstance(getattr(module, name), JITFunction)
    kernel = dispatch.SUM
    experts = Experts(experts=4, chosen=2, hidden=64, inner=32, norm_topk_prob=False)
    tile = dispatch.tiles(kernel.operator, experts, 16)[0]
    parameters = {"parts": "*fp16", "token_slot": "*i32", "tokens": "i32", "y": "*fp16"}
    source = Source(prefill.expert_sum, parameters, kernel.values(experts, tile), tile.num_warps, tile.num_stages)
    assert "expert_sum" in compile_source(source, 87, 85).ptx


def test_infinities_in_the_input_saturate(interpret: Any) -> None:
    x = torch.tensor([[np.inf, -np.inf, 65504, -65504, 0.25, -0.25, 0.75, 1.25] * 2]).half()
    experts = Experts(experts=5, chosen=2, hidden=16, inner=16, norm_topk_prob=False, block_rows=16)
    x_int8, *_ = interpret("ExpertRoute", experts, [x, torch.zeros(1, 5), torch.tensor([0.5])], 1)
    # Half to even: 0.5, -0.5, 1.5 and 2.5 steps.
    assert x_int8[0, :8].tolist() == [127, -128, 127, -128, 0, 0, 2, 2]
