"""Each kernel started through the CUDA driver as a plugin's launch starts it, against the oracle.

The launch dimensions are those that the registered plugin returns: `test_registration` holds the two together.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins import oracle
from sonoedge.export.plugins.artifact import Artifact, Parameter
from sonoedge.export.plugins.dispatch import Activation, Experts, output_shapes
from sonoedge.export.plugins.kernel_set import KernelChoice, Target, choices, compile_all
from sonoedge.export.plugins.launch import Gpu, Launch, Output, planned_launch
from sonoedge.export.plugins.registration import tokens_told

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = npt.NDArray[Any]

EXPERTS = Experts(experts=5, chosen=3, hidden=208, inner=144, norm_topk_prob=True, block_rows=32)
PREFILL_TOKENS = 77
DECODE_TOKENS = (1, 2, 8)
# One step of the type, relative; float32 sums are added in another order than the oracle's.
ROUNDING: dict[Activation, float] = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-18}


# ------------------------------------------------------------------------------------------------- on a GPU
@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    """The GPU of this machine."""
    try:
        found = Gpu()
    except SonoEdgeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    with found:
        yield found


def ptx_version(sm: int) -> int:
    """The oldest PTX version that knows an SM's exact target, so that any driver of the GPU reads it."""
    if sm < 100:
        return 85
    return {100: 86, 120: 87}.get(sm, 90)


class Material:
    """Inputs of every operator and what the oracle makes of them, by name."""

    def __init__(self, tokens: int, activation: Activation) -> None:
        rng = np.random.default_rng(tokens)
        e, h, i = EXPERTS.experts, EXPERTS.hidden, EXPERTS.inner
        x = oracle.rounded(rng.standard_normal((tokens, h), np.float32), activation)
        logits = rng.standard_normal((tokens, e), np.float32)
        logits[:: max(tokens // 3, 1), 1:] = 0.25  # ties
        gate_up, down = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((e, 2 * i, h), (e, h, i)))
        gate_up_scale = rng.uniform(1e-3, 2e-3, (e, 2 * i)).astype(np.float32)
        down_scale = rng.uniform(1e-3, 2e-3, (e, h)).astype(np.float32)
        input_scale, hidden_scale = np.array([0.02], np.float32), rng.uniform(0.02, 0.05, e).astype(np.float32)
        routed = oracle.route(x, logits, input_scale, EXPERTS)
        inner_int8 = oracle.up(
            routed.x_int8, gate_up, gate_up_scale, input_scale, hidden_scale, routed.block_expert, routed.slot_token,
            EXPERTS,
        )  # fmt: skip
        parts = oracle.down(
            inner_int8, down, down_scale, hidden_scale, routed.block_expert, routed.slot_weight, EXPERTS, activation
        )
        inner_float = oracle.up_decode(x, logits, gate_up, gate_up_scale, EXPERTS, activation)
        self.values: dict[str, Array] = {
            "x": x,
            "logits": logits,
            "gate_up_values": gate_up,
            "gate_up_scale": gate_up_scale,
            "down_values": down,
            "down_scale": down_scale,
            "input_scale": input_scale,
            "hidden_scale": hidden_scale,
            **msgspec.structs.asdict(routed),
            "inner_int8": inner_int8,
            "parts": parts,
            "inner_float": inner_float,
        }
        self.sums = {
            "ExpertSum": oracle.summed(parts, routed.token_slot, activation),
            "ExpertDownDecode": oracle.down_decode(inner_float, logits, down, down_scale, EXPERTS, activation),
        }
        # Empty blocks and experts that no token chose are left as they were.
        taken = oracle.chosen_experts(logits, EXPERTS.chosen).any(axis=0)
        filled = np.repeat(routed.block_expert < e, EXPERTS.block_rows)
        self.written = {"inner_int8": filled, "parts": filled, "inner_float": np.broadcast_to(taken, (tokens, e))}


def encoded(values: Array, activation: Activation) -> Array:
    """Activations as the GPU holds them; bfloat16, which NumPy lacks, as its bits."""
    if activation != "bfloat16":
        return values.astype(activation)
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def decoded(values: Array, activation: Activation) -> Array:
    """The way back, to float32."""
    if activation != "bfloat16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def run(
    gpu: Gpu, choice: KernelChoice, made: tuple[Artifact, str], material: Material, tokens: int
) -> dict[str, Array]:
    """Outputs of a kernel by name, activations as float32."""
    kernel, activation = choice.kernel, choice.activation
    artifact, ptx = made
    inputs = [
        encoded(material.values[one.name], activation) if one.dtype == "A" else material.values[one.name]
        for one in kernel.inputs
    ]
    shapes = output_shapes(kernel.operator, EXPERTS, tokens)
    held = "uint16" if activation == "bfloat16" else activation
    outputs = [
        Output(shape, held if one.dtype == "A" else one.dtype)
        for one, shape in zip(kernel.outputs, shapes, strict=True)
    ]
    told = tokens_told(kernel.operator, EXPERTS, EXPERTS.blocks(tokens) if kernel.operator == "ExpertDown" else tokens)
    start = planned_launch(artifact, kernel, EXPERTS, choice.tile, tokens)
    once, again = (gpu.run(artifact, ptx, start, inputs, [told], outputs) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert first.tobytes() == second.tobytes(), f"{artifact.name} gives other bits when it runs again"
    return {
        one.name: decoded(value, activation) if one.dtype == "A" else value
        for one, value in zip(kernel.outputs, once, strict=True)
    }


def compare(choice: KernelChoice, found: dict[str, Array], material: Material) -> None:
    """Integers are the same, but for int8 at the edge between two; floats are within the rounding of their type."""
    for name, value in found.items():
        expected = material.sums.get(choice.kernel.operator, material.values.get(name))
        assert expected is not None
        written = material.written.get(name, np.ones(len(value), np.bool_))
        got, expected = value[written], expected[written]
        if name == "inner_int8":
            apart = np.abs(got.astype(np.int32) - expected)
            assert apart.max() <= 1, choice.name
            assert (apart > 0).mean() < 0.01, choice.name
        elif expected.dtype.kind == "i":
            np.testing.assert_array_equal(got, expected, err_msg=f"{choice.name} {name}")
        else:
            step = 1e-5 if name == "slot_weight" else 4 * ROUNDING[choice.activation]
            largest = float(np.abs(expected).max())
            np.testing.assert_allclose(got, expected, step, step * largest, err_msg=f"{choice.name} {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", list(ROUNDING))
@pytest.mark.parametrize("tokens", [PREFILL_TOKENS, *DECODE_TOKENS])
def test_every_kernel_computes_what_the_oracle_says(
    gpu: Gpu, tmp_path_factory: pytest.TempPathFactory, tokens: int, activation: Activation
) -> None:
    prefill = tokens == PREFILL_TOKENS
    wanted = choices(EXPERTS, activation, (tokens,) if prefill else (), () if prefill else (tokens,))
    target = Target(gpu.sm, ptx_version(gpu.sm))
    material = Material(tokens, activation)
    cache = tmp_path_factory.getbasetemp() / "gpu_kernels"
    for choice, made in zip(wanted, compile_all(wanted, target, cache), strict=True):
        compare(choice, run(gpu, choice, made, material, tokens), material)


class Perfect:
    """A GPU that computes what the oracle says, and spoils one element of an output if asked to."""

    def __init__(self, choice: KernelChoice, material: Material, spoilt: int | None = None) -> None:
        self.choice, self.material, self.spoilt = choice, material, spoilt

    def run(
        self,
        artifact: Artifact,
        ptx: str,
        launch: Launch,
        inputs: list[Array],
        scalars: list[int],
        outputs: list[Output],
    ) -> list[Array]:
        kernel = self.choice.kernel
        assert len(inputs) == len(kernel.inputs)
        results = []
        for place, (one, output) in enumerate(zip(kernel.outputs, outputs, strict=True)):
            value = self.material.sums.get(kernel.operator, self.material.values.get(one.name))
            assert value is not None
            held = encoded(value, self.choice.activation) if one.dtype == "A" else value.copy()
            assert (held.shape, held.dtype) == (output.shape, np.dtype(output.dtype))
            written = self.material.written.get(one.name, np.ones(len(held), np.bool_))
            held[~written] = 99  # what is not compared
            if place == self.spoilt:
                held[np.unravel_index(int(np.flatnonzero(written)[0]), written.shape)] = 99
            results.append(held)
        return results


@pytest.mark.parametrize("activation", list(ROUNDING))
@pytest.mark.parametrize("tokens", [PREFILL_TOKENS, *DECODE_TOKENS])
def test_the_comparison_takes_right_results_only(tokens: int, activation: Activation) -> None:
    prefill = tokens == PREFILL_TOKENS
    material = Material(tokens, activation)
    for choice in choices(EXPERTS, activation, (tokens,) if prefill else (), () if prefill else (tokens,)):
        for spoilt in (None, *range(len(choice.kernel.outputs))):
            gpu: Any = Perfect(choice, material, spoilt)
            found = run(gpu, choice, (ADD, PTX), material, tokens)
            if spoilt is None:
                compare(choice, found, material)
            else:
                with pytest.raises(AssertionError):
                    compare(choice, found, material)


# -------------------------------------------------------------------------------------- the launch, without
PTX = """.version 8.5
.target sm_87
.address_size 64
.visible .entry add(
\t.param .u64 .ptr .global .align 1 add_param_0,
\t.param .u32 add_param_1,
\t.param .u64 .ptr .global .align 1 add_param_2
)
.reqntid 64
{
\tret;
}
"""
ADD = Artifact(
    name="add",
    operator="Add",
    constants={},
    entry="add",
    sm=87,
    ptx=85,
    num_warps=2,
    num_stages=1,
    shared_memory_bytes=49152,
    registers=8,
    spills=0,
    parameters=(Parameter("x", "*i32"), Parameter("tokens", "i32"), Parameter("y", "*i32")),
    file="add.ptx",
    sha256="",
)
START = Launch((3, 1, 1), (64, 1, 1), 49152)


class Driver:
    """A CUDA driver whose only kernel adds a number to an array; its memory is this process's."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.launched: list[tuple[int, ...]] = []
        self.asked_shared = 0
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._status(name)

    def _status(self, name: str) -> int:
        return 700 if name == self.failing else 0

    def cuDeviceGetAttribute(self, value: Any, which: int, _device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[which]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        held = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(held)
        self.memory[ctypes.addressof(held)] = held
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to: ctypes.c_uint64, source: ctypes.c_void_p, size: ctypes.c_size_t) -> int:
        ctypes.memmove(to.value, source, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: ctypes.c_void_p, source: ctypes.c_uint64, size: ctypes.c_size_t) -> int:
        ctypes.memmove(to, source.value, size.value)
        return 0

    def cuFuncSetAttribute(self, _function: Any, which: int, value: int) -> int:
        assert which == 8
        self.asked_shared = value
        return 0

    def cuLaunchKernel(self, _function: Any, *rest: Any) -> int:
        *shape, stream, parameters, extra = rest
        self.launched.append(tuple(number.value for number in shape))
        assert stream is None
        assert extra is None
        assert len(parameters) == len(ADD.parameters)
        x, number, y = parameters
        source = ctypes.c_uint64.from_address(x).value
        to = ctypes.c_uint64.from_address(y).value
        added = ctypes.c_int32.from_address(number).value
        values = np.frombuffer(self.memory[source], np.int32)
        result = np.frombuffer(self.memory[to], np.int32)
        assert (result == -1).all()  # every output byte starts as 0xFF
        result[:-1] = (values + added)[:-1]  # and what a kernel does not write stays so
        return self._status("cuLaunchKernel")

    def cuGetErrorString(self, _status: int, text: Any) -> int:
        text._obj.value = b"an illegal memory access was encountered"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """In the place of libcuda."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    return driver


def test_a_launch_passes_inputs_numbers_outputs_and_nothing_else(driver: Driver) -> None:
    with Gpu() as gpu:
        assert gpu.sm == 87
        (found,) = gpu.run(ADD, PTX, START, [np.arange(5, dtype=np.int32)], [-7], [Output((5,), "int32")])
    assert found.tolist() == [-7, -6, -5, -4, -1]
    assert driver.launched == [(3, 1, 1, 64, 1, 1, 49152)]
    assert driver.asked_shared == 49152
    assert driver.memory == {}


def test_another_number_of_arguments_is_refused(driver: Driver) -> None:
    with Gpu() as gpu, pytest.raises(SonoEdgeError, match="add has 3 parameters and got 4"):
        gpu.run(ADD, PTX, START, [np.zeros(5, np.int32)], [1, 2], [Output((5,), "int32")])
    assert driver.launched == []


def test_a_kernel_with_scratch_pointers_is_refused(driver: Driver) -> None:
    scratch = PTX.replace("add_param_2\n", "add_param_2,\n\t.param .u64 .ptr .global .align 1 add_param_3\n")
    with Gpu() as gpu, pytest.raises(SonoEdgeError, match=r"add\.ptx: parameters is \['u64', 'u32', 'u64', 'u64'\]"):
        gpu.run(ADD, scratch, START, [np.zeros(5, np.int32)], [1], [Output((5,), "int32")])


def test_a_failed_launch_is_told_and_its_memory_freed(driver: Driver) -> None:
    driver.failing = "cuLaunchKernel"
    with Gpu() as gpu, pytest.raises(SonoEdgeError, match=r"cuLaunchKernel failed with 700 \(an illegal memory access"):
        gpu.run(ADD, PTX, START, [np.zeros(5, np.int32)], [1], [Output((5,), "int32")])
    assert driver.memory == {}


def test_a_machine_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(SonoEdgeError, match=r"libcuda\.so\.1 cannot be loaded .*: install NVIDIA's driver"):
        Gpu()


def test_the_oracle_agrees_with_itself_after_16_bit_storage() -> None:
    for activation in ROUNDING:
        values = oracle.rounded(np.linspace(-3, 3, 1000, dtype=np.float32), activation)
        assert np.array_equal(decoded(encoded(values, activation), activation), values)
