"""Triton kernels compiled to PTX ahead of time: for any SM and PTX version, on a host without a GPU.

Triton's own compile function goes on to an assembler that, for SMs below 100, knows no PTX newer than 8.8. PTX is what
travels in a bundle, so the stages are run here as far as PTX.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins.artifact import WARP_THREADS
from sonoedge.export.plugins.dispatch import POINTER_ALIGNMENT_BYTES
from sonoedge.export.plugins.ptx import read_entry, remove_scratch_pointers

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction


class Source(msgspec.Struct, frozen=True):
    """A kernel with everything that its code depends on."""

    function: "JITFunction[Any]"
    # Name → type in Triton's spelling, in order: "*fp16" is an address of float16, "i32" a number.
    parameters: dict[str, str]
    constants: dict[str, int]
    num_warps: int
    num_stages: int


class Compiled(msgspec.Struct, frozen=True):
    """PTX that a plugin's launch can start as it is."""

    entry: str
    ptx: str
    shared_memory_bytes: int  # that the launch must ask for, a block


def compile_source(source: Source, sm: int, ptx_version: int) -> Compiled:
    """Compile for an SM and a PTX version (85 is 8.5).

    Raises SonoEdgeError when the kernel needs memory that a plugin's launch does not pass.
    """
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", sm, WARP_THREADS)
    backend = make_backend(target)
    options = backend.parse_options(compile_options(source, ptx_version))
    signature = {name: source.parameters.get(name, "constexpr") for name in source.function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", POINTER_ALIGNMENT_BYTES]]
        for place, type_ in enumerate(signature.values())
        if type_.startswith("*")
    }
    tree = ASTSource(source.function, signature, source.constants, aligned)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    metadata: dict[str, Any] = {"target": target, **vars(options)}
    # Line information would carry the paths of this machine into the bundle.
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        backend.add_stages(stages, options, tree.language)
        code = tree.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            code = stages[stage](code, metadata)
    if metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
        raise SonoEdgeError(
            f"the kernel {source.function.__name__} needs scratch memory, which a plugin's launch does not pass: "
            "write the kernel without it"
        )
    ptx = remove_scratch_pointers(code)
    return Compiled(read_entry(ptx).name, ptx, metadata["shared"])


def compile_options(source: Source, ptx_version: int) -> dict[str, int | bool]:
    """Return the options of Triton that a kernel is compiled with."""
    return {
        "ptx_version": ptx_version,
        "num_warps": source.num_warps,
        "num_stages": source.num_stages,
        "enable_fp_fusion": True,
    }
