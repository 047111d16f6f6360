"""Kernels under Triton's interpreter, in the same process that compiles them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sonoedge.export.plugins.dispatch import (
    DECODE_TOKENS,
    KERNELS,
    Activation,
    Experts,
    Tile,
    grid,
    output_shapes,
    power_of_two,
)

GUARD = 512  # elements around every buffer


class Interpreter:
    """Launches operators on CPU tensors."""

    def __init__(self) -> None:
        from sonoedge.export.plugins import decode, prefill, routing

        self._modules: dict[str, ModuleType] = {"decode": decode, "prefill": prefill, "routing": routing}

    def __call__(
        self,
        operator: str,
        experts: Experts,
        inputs: Sequence[Tensor],
        tokens: int,
        activation: Activation = "float16",
        *,
        splits: int = 2,
        backwards: bool = False,
    ) -> list[Tensor]:
        """Outputs of an operator, written over a pattern; `backwards`: the last program runs first.

        Raises AssertionError for an address outside the buffers; between any two of them lies a guard.
        """
        kernel, tile = KERNELS[operator], small_tile(operator, experts, splits)
        dtypes = {"A": getattr(torch, activation), "float32": torch.float32, "int8": torch.int8, "int32": torch.int32}
        given = [
            _guarded(values.to(dtypes[buffer.dtype])) for values, buffer in zip(inputs, kernel.inputs, strict=True)
        ]
        shapes = output_shapes(operator, experts, tokens)
        results = [
            _guarded(_spoilt(shape, dtypes[buffer.dtype])) for shape, buffer in zip(shapes, kernel.outputs, strict=True)
        ]
        programs = grid(operator, experts, tile, tokens)
        with self.launches(programs if backwards else None, [view for _, view in (*given, *results)]):
            launch = getattr(self._modules[kernel.module], kernel.function)[programs]
            buffers = [[view for _, view in each] for each in (given, results)]
            launch(*buffers[0], tokens, *buffers[1], **kernel.values(experts, tile))
        return [view for _, view in results]

    @contextmanager
    def launches(
        self, backwards: tuple[int, int, int] | None = None, buffers: Sequence[Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, launches of the kernels run here, and touch nothing but `buffers` where they are given.

        backwards: the grid of a launch whose last program runs first.
        """
        with interpreted(list(self._modules.values()), backwards, buffers), np.errstate(all="ignore"):
            yield


def small_tile(operator: str, experts: Experts, splits: int) -> Tile:
    """Blocks so small that every loop runs more than once, and over an edge."""
    wide = power_of_two(experts.experts)
    decode = {"block_experts": wide, "block_tokens": DECODE_TOKENS if splits else 1, "block_k": 32, "splits": splits}
    constants = {
        "ExpertRoute": {"block_experts": wide, "block_tokens": 32, "block_values": 64},
        "ExpertUp": {"block_inner": 32, "block_k": 32, "group": 2},
        "ExpertDown": {"block_hidden": 32, "block_k": 32, "group": 2},
        "ExpertSum": {"block_hidden": 32},
        "ExpertUpDecode": {**decode, "block_inner": 16},
        "ExpertDownDecode": {**decode, "block_hidden": 16},
    }
    return Tile("small", 4, 1, constants[operator])


@pytest.fixture(scope="session")
def interpret() -> Interpreter:
    """Triton's interpreter for the expert kernels."""
    return Interpreter()


@contextmanager
def interpreted(
    modules: list[ModuleType], backwards: tuple[int, int, int] | None, buffers: Sequence[Tensor] | None
) -> Iterator[None]:
    """Inside, every @triton.jit function of `modules` and of Triton's own library runs under the interpreter.

    TRITON_INTERPRET does this when a module is imported, for a whole process; compiling needs the functions as before.
    """
    import triton.language as tl
    from triton import knobs
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, _patch_lang
    from triton.runtime.jit import JITFunction

    class Interpreted(InterpretedFunction):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            """A call from a kernel; the base class would patch Triton's library anew each time, which takes long."""
            return self.rewrite()(*arguments, **named)

    # What a kernel calls leaves Triton's library as the interpreter wants it.
    library = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.condition, tl.core.tensor_descriptor_base)
    with pytest.MonkeyPatch.context() as patch, knobs.runtime.scope(), _restored(library):
        knobs.runtime.interpret = True
        for module in (standard, tl, *modules):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, Interpreted(value.fn))
        _patch_lang(standard.sum.fn)
        cast, dot, place = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        ranges = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in buffers or ())
        starts, ends = (np.array(edges, np.uint64) for edges in zip(*ranges, strict=True)) if ranges else (None, None)

        def check(pointers: Any, mask: Any) -> None:
            if starts is None or ends is None:
                return
            addresses = pointers.data[mask.data.astype(np.bool_)]
            at = np.searchsorted(starts, addresses, side="right") - 1
            size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
            assert (at >= 0).all(), "an address before all buffers"
            assert (addresses + size <= ends[at]).all(), "an address outside the buffers"

        def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            check(pointers, mask)
            return load(self, pointers, mask, *rest)

        def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            check(pointers, mask)
            return store(self, pointers, value, mask, *rest)

        def nearest_cast(self: Any, value: Any, to: Any) -> Any:
            """The interpreter cuts bfloat16 off, where hardware rounds half to even."""
            if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
                exact = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16().view(torch.int16).numpy()
                return type(value)(exact.view(np.uint16), to.scalar)
            if value.dtype.scalar.is_int() and to.scalar == tl.bfloat16:
                return nearest_cast(self, cast(self, value, tl.float32), to)
            return cast(self, value, to)

        def float_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
            """The interpreter multiplies the bits of bfloat16 as if they were integers."""
            wide = [cast(self, side, tl.float32) if side.dtype == tl.bfloat16 else side for side in (left, right)]
            return dot(self, *wide, *rest)

        def assembled(_self: Any, text: str, constraints: str, values: list[Any], *rest: Any) -> Any:
            """The interpreter has no assembler."""
            assert (constraints, rest[-1]) == ("=r,=r,r", 4), "four bytes in, two pairs of halves out"
            data = np.ascontiguousarray(values[0].data)
            first, second = run_ptx(text, data.view(np.uint32))
            halves = np.stack([first, second], axis=-1).view(np.float16).reshape(data.shape)
            return SimpleNamespace(get_result=lambda _: type(values[0])(halves, tl.float16))

        def mirrored(self: Any, *at: int) -> None:
            assert backwards is not None
            place(self, *(size - 1 - index for size, index in zip(backwards, at, strict=True)))

        patch.setattr(InterpreterBuilder, "cast_impl", nearest_cast)
        patch.setattr(InterpreterBuilder, "create_dot", float_dot)
        patch.setattr(InterpreterBuilder, "create_inline_asm", assembled)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        if backwards is not None:
            patch.setattr(InterpreterBuilder, "set_grid_idx", mirrored)
        yield


def run_ptx(text: str, word: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """What a few PTX instructions leave in $0 and $1 for $2 = word (NVIDIA, Parallel Thread Execution ISA)."""
    registers = {"$2": word}

    def operand(name: str) -> npt.NDArray[np.uint32]:
        return registers[name] if name in registers else np.full_like(word, int(name, 16))

    def permuted(low: npt.NDArray[np.uint32], high: npt.NDArray[np.uint32], selector: str) -> npt.NDArray[np.uint32]:
        pool = np.stack([low, high], axis=-1).view(np.uint8)  # [..., 8], a word's lowest byte first
        picked = [pool[..., int(selector, 16) >> 4 * place & 7] for place in range(4)]
        return np.stack(picked, axis=-1).view(np.uint32)[..., 0]

    for line in text.strip(" {}\n").split(";"):
        name, _, rest = line.strip().partition(" ")
        target, *sources = [part.strip() for part in rest.split(",")]
        match name:
            case ".reg" | "":
                continue
            case "mov.b32":
                value = operand(sources[0])
            case "xor.b32":
                value = operand(sources[0]) ^ operand(sources[1])
            case "prmt.b32":
                value = permuted(operand(sources[0]), operand(sources[1]), sources[2])
            case "sub.f16x2":
                left, right = (operand(source)[..., None].view(np.float16) for source in sources)
                value = (left - right).view(np.uint32)[..., 0]
            case _:
                raise AssertionError(f"{name} is an instruction that this test does not know")
        registers[target] = value
    return registers["$0"], registers["$1"]


@contextmanager
def _restored(namespaces: Sequence[Any]) -> Iterator[None]:
    before = [dict(vars(namespace)) for namespace in namespaces]
    yield
    for namespace, members in zip(namespaces, before, strict=True):
        for name in vars(namespace).keys() - members.keys():
            delattr(namespace, name)
        for name, member in members.items():
            if vars(namespace)[name] is not member:
                setattr(namespace, name, member)


def _spoilt(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What nobody wrote: NaN, or the lowest integer."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def _guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """A flat tensor with guards on both sides, and the part of it that holds `values`."""
    guard = _spoilt((GUARD,), values.dtype)
    whole = torch.cat([guard, values.flatten(), guard])
    return whole, whole[GUARD : GUARD + values.numel()].view(values.shape)
