"""Every expert kernel computes what the oracle says, whatever the routing and whatever the widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonoedge.export.plugins import dispatch, oracle
from sonoedge.export.plugins.dispatch import Activation, Experts

Array = npt.NDArray[Any]
Launch = Callable[..., list[Array]]

quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Case(msgspec.Struct, frozen=True):
    """Sizes, a routing and the inputs that a seed gives; all sums are exact in float32."""

    experts: Experts
    tokens: int
    routing: str
    activation: Activation
    seed: int

    def logits(self) -> Array:
        """float32 [tokens, experts]"""
        rng = np.random.default_rng(self.seed)
        shape = (self.tokens, self.experts.experts)
        if self.routing == "one expert":  # and the others far behind, in the order of their index
            logits = np.full(shape, -200.0)
            logits[:, self.seed % self.experts.experts] = 0
        elif self.routing == "equal":
            logits = np.full(shape, float(rng.integers(-3, 4)))
        elif self.routing == "ties":
            logits = rng.integers(-1, 2, shape).astype(np.float64)
        elif self.routing == "last expert empty":
            logits = rng.normal(size=shape)
            logits[:, -1] = -50
        else:
            logits = rng.normal(scale=2, size=shape)
        return logits.astype(np.float32)

    def x(self) -> Array:
        """float32 [tokens, hidden] that all types hold; some values saturate."""
        rng = np.random.default_rng([self.seed, 1])
        return (rng.integers(-200, 201, (self.tokens, self.experts.hidden)) / 8).astype(np.float32)

    def weights(self) -> dict[str, Array]:
        """Weights over the whole range of int8, scales that are powers of two."""
        rng = np.random.default_rng([self.seed, 2])
        count, hidden, inner = self.experts.experts, self.experts.hidden, self.experts.inner
        return {
            "gate_up_values": rng.integers(-128, 128, (count, 2 * inner, hidden), np.int8),
            "gate_up_scale": 2.0 ** rng.integers(-10, -7, (count, 2 * inner)).astype(np.float32),
            "down_values": rng.integers(-128, 128, (count, hidden, inner), np.int8),
            "down_scale": 2.0 ** rng.integers(-9, -6, (count, hidden)).astype(np.float32),
            "input_scale": np.array([0.25], np.float32),
            "hidden_scale": 2.0 ** rng.integers(-4, 0, count).astype(np.float32),
        }


@st.composite
def cases(draw: st.DrawFn, most_tokens: int) -> Case:
    count = draw(st.integers(1, 6), label="experts")
    experts = Experts(
        experts=count,
        chosen=draw(st.integers(1, count), label="chosen"),
        hidden=draw(st.sampled_from((16, 32, 48, 80)), label="hidden"),
        inner=draw(st.sampled_from((16, 48, 64)), label="inner"),
        norm_topk_prob=draw(st.booleans()),
        block_rows=draw(st.sampled_from((16, 32))),
    )
    return Case(
        experts,
        tokens=draw(st.integers(1, most_tokens), label="tokens"),
        routing=draw(st.sampled_from(("random", "ties", "equal", "one expert", "last expert empty"))),
        activation=draw(st.sampled_from(("float16", "bfloat16", "float32"))),
        seed=draw(st.integers(0, 1 << 16)),
    )


@pytest.fixture(scope="session")
def launch(interpret: Any) -> Launch:
    """Run an operator of a case on its inputs, in the order of the node's; outputs as the kernel left them."""

    def run(operator: str, case: Case, inputs: Sequence[Array], splits: int = 2) -> list[Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
        return list(map(array, interpret(operator, case.experts, tensors, case.tokens, case.activation, splits=splits)))

    return run


# Matrix units take any number of tokens, lanes take one.
decode_cases = st.one_of(st.tuples(cases(8), st.just(2)), st.tuples(cases(1), st.just(0)))


def array(tensor: Tensor) -> Array:
    """The tensor in NumPy, 16-bit floats as float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def computed(operator: str, case: Case, inputs: Sequence[Array]) -> Array:
    """The one output of an operator by the oracle."""
    (output,) = oracle.compute(operator, inputs, case.experts, case.activation)
    return output


def prefill_inputs(case: Case, operator: str) -> list[Array]:
    """What the oracle hands to an operator of prefill."""
    known: dict[str, Array] = {"x": case.x(), "logits": case.logits(), **case.weights()}
    routed = oracle.route(known["x"], known["logits"], known["input_scale"], case.experts)
    known |= msgspec.structs.asdict(routed)
    names = {name: [buffer.name for buffer in dispatch.KERNELS[name].inputs] for name in dispatch.KERNELS}
    if operator in ("ExpertDown", "ExpertSum"):
        known["inner_int8"] = computed("ExpertUp", case, [known[name] for name in names["ExpertUp"]])
    if operator == "ExpertSum":
        down = computed("ExpertDown", case, [known[name] for name in names["ExpertDown"]])
        empty = np.repeat(routed.block_expert == case.experts.experts, case.experts.block_rows)
        known["parts"] = np.where(empty[:, None], np.float32("nan"), down)  # nobody wrote them
    return [known[name] for name in names[operator]]


def live(case: Case, block_expert: Array) -> Array:
    """Slots of blocks that are not empty."""
    return np.repeat(block_expert < case.experts.experts, case.experts.block_rows)


EDGE = Experts(experts=5, chosen=5, hidden=48, inner=80, norm_topk_prob=True, block_rows=16)
FULL = Case(EDGE, 33, "random", "bfloat16", 3)  # every expert chosen by every token, no size a power of two
LONE = Case(
    Experts(experts=1, chosen=1, hidden=16, inner=16, norm_topk_prob=False, block_rows=16), 1, "random", "float16", 0
)


@quick
@given(case=cases(40))
@example(case=FULL)
@example(case=LONE)
def test_route(launch: Launch, case: Case) -> None:
    inputs = prefill_inputs(case, "ExpertRoute")
    x_int8, block_expert, slot_token, slot_weight, token_slot = launch("ExpertRoute", case, inputs)
    expected = oracle.route(inputs[0], inputs[1], inputs[2], case.experts)
    np.testing.assert_array_equal(x_int8, expected.x_int8)
    np.testing.assert_array_equal(block_expert, expected.block_expert)
    np.testing.assert_array_equal(slot_token, expected.slot_token)
    np.testing.assert_array_equal(token_slot, expected.token_slot)
    # Only the order of the softmax's sum is free.
    np.testing.assert_allclose(slot_weight, expected.slot_weight, rtol=5e-7, atol=0)


@quick
@given(case=cases(30))
@example(case=FULL)
@example(case=LONE)
def test_up(launch: Launch, case: Case) -> None:
    inputs = prefill_inputs(case, "ExpertUp")
    (hidden,) = launch("ExpertUp", case, inputs)
    rows = live(case, inputs[5])
    np.testing.assert_array_equal(hidden[rows], computed("ExpertUp", case, inputs)[rows])
    assert (hidden[~rows] == -128).all(), "an empty block was computed"


@quick
@given(case=cases(30))
@example(case=FULL)
@example(case=LONE)
def test_down(launch: Launch, case: Case) -> None:
    inputs = prefill_inputs(case, "ExpertDown")
    (parts,) = launch("ExpertDown", case, inputs)
    rows = live(case, inputs[4])
    np.testing.assert_array_equal(parts[rows], computed("ExpertDown", case, inputs)[rows])
    assert np.isnan(parts[~rows]).all(), "an empty block was computed"


@quick
@given(case=cases(30))
@example(case=FULL)
@example(case=LONE)
def test_sum(launch: Launch, case: Case) -> None:
    inputs = prefill_inputs(case, "ExpertSum")
    (y,) = launch("ExpertSum", case, inputs)
    np.testing.assert_array_equal(y, computed("ExpertSum", case, inputs))


@quick
@given(decode_cases)
@example((msgspec.structs.replace(FULL, tokens=7), 2))
@example((LONE, 0))
def test_up_decode(launch: Launch, drawn: tuple[Case, int]) -> None:
    case, splits = drawn
    weights = case.weights()
    inputs = [case.x(), case.logits(), weights["gate_up_values"], weights["gate_up_scale"]]
    (hidden,) = launch("ExpertUpDecode", case, inputs, splits)
    anyone = np.any(oracle.chosen_experts(inputs[1], case.experts.chosen), axis=0)
    expected = computed("ExpertUpDecode", case, inputs)
    np.testing.assert_array_equal(hidden[:, anyone], expected[:, anyone])
    assert np.isnan(hidden[:, ~anyone]).all(), "an expert that no token chose was computed"


@quick
@given(decode_cases)
@example((msgspec.structs.replace(FULL, tokens=7), 2))
@example((LONE, 0))
def test_down_decode(launch: Launch, drawn: tuple[Case, int]) -> None:
    case, splits = drawn
    weights, logits = case.weights(), case.logits()
    rng = np.random.default_rng(case.seed)
    hidden = rng.integers(-64, 65, (case.tokens, case.experts.experts, case.experts.inner)).astype(np.float32) / 4
    taken = oracle.chosen_experts(logits, case.experts.chosen)
    inputs = [np.where(taken[:, :, None], hidden, np.float32("nan")), logits]  # what a token did not choose is not its
    inputs += [weights["down_values"], weights["down_scale"]]
    (y,) = launch("ExpertDownDecode", case, inputs, splits)
    expected = computed("ExpertDownDecode", case, [hidden, *inputs[1:]])
    if case.routing == "one expert":  # its weight is 1, the others' 0
        np.testing.assert_array_equal(y, expected)
    # Elsewhere weights differ in their last bit, which the rounding of y may turn into one of its own.
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}[case.activation]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=step, atol=1e-6 * scale)
