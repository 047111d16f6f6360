"""Every kernel of the released EchoVLM, compiled without a GPU for every SM and PTX version of the profiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sonoedge.device_profiles import list_profiles, load_profile
from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins import kernel_cache, kernel_set, report
from sonoedge.export.plugins.artifact import Artifact, Parameter, read_index, read_ptx
from sonoedge.export.plugins.compile import Source, compile_source
from sonoedge.export.plugins.dispatch import DECODE, KERNELS, PREFILL, Experts
from sonoedge.export.plugins.kernel_set import KernelChoice, Target, choices, compile_all, experts_for, targets
from sonoedge.export.plugins.launch import check_contract
from sonoedge.export.plugins.ptx import read_entry
from sonoedge.manifest import ExpertsSpec

ECHOVLM = ExpertsSpec(experts=4, chosen=2, hidden=3584, inner=1408, norm_topk_prob=False)
SMALL = ExpertsSpec(experts=3, chosen=2, hidden=48, inner=32, norm_topk_prob=True)
PREFILL_TOKENS = (1, 32, 256, 1024)
EXPERTS = experts_for(ECHOVLM, PREFILL_TOKENS[-1])

DATA_CENTRE = Target(sm=90, ptx_version=85)  # no profile: where kernels are measured
TARGETS = sorted({DATA_CENTRE, *(target for one in list_profiles() for target in targets(one, plugins_only=False))})
FULL = Target(sm=87, ptx_version=92)  # what the whole project is about


OTHERS = [target for target in TARGETS if target != FULL]


class Limits(msgspec.Struct, frozen=True):
    """What a kernel may take."""

    shared_memory_bytes: int  # of a block that asks for more than the default
    registers: int = 255  # of a thread, the most that an instruction can name
    spills: int = 0


# CUDA Programming Guide, technical specifications for each compute capability: shared memory of one block.
LIMITS = {
    86: Limits(99 * 1024),
    87: Limits(163 * 1024),
    89: Limits(99 * 1024),
    90: Limits(227 * 1024),
    110: Limits(227 * 1024),
    120: Limits(99 * 1024),
}
DEFAULT_SHARED_BYTES = 48 * 1024  # a block may take without asking
REGISTERS = 64 * 1024  # of a multiprocessor, for all threads of a block


def wanted(target: Target) -> list[KernelChoice]:
    """Every tile of every operator for the main target, elsewhere the likeliest one: a kernel compiles for a second."""
    if target == FULL:
        return choices(EXPERTS, "float32", PREFILL_TOKENS, (1, 2, 8))
    found = choices(EXPERTS, "float32", PREFILL_TOKENS, kernel_set.DECODE_TOKENS)
    return list({one.kernel.operator: one for one in reversed(found)}.values())


class Compiled(msgspec.Struct, frozen=True):
    """Kernels with their PTX, and the cache that they were left in."""

    folder: Path
    kernels: dict[Target, list[tuple[Artifact, str]]]


COMPILE = """
import sys
from pathlib import Path
from test_aot import OTHERS, compile_all, wanted
for target in OTHERS[1:]:
    list(compile_all(wanted(target), target, Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Every kernel, most targets compiled by another process at the same time: the cache holds both's."""
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-c", COMPILE, str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parent) as other:
        for target in (FULL, OTHERS[0]):
            list(compile_all(wanted(target), target, folder))
    assert other.returncode == 0
    return Compiled(folder, {target: list(compile_all(wanted(target), target, folder)) for target in TARGETS})


def test_the_targets_are_all_that_the_project_names() -> None:
    assert {target.sm for target in TARGETS} == set(LIMITS)
    assert {Target(87, 85), Target(87, 92)} < set(TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm{target.sm}-ptx{target.ptx_version}")
class TestTarget:
    """What holds for each kernel on one SM with one PTX version."""

    def test_it_keeps_to_the_limits(self, compiled: Compiled, target: Target) -> None:
        limits = LIMITS[target.sm]
        for artifact, _ in compiled.kernels[target]:
            assert artifact.registers <= limits.registers, artifact.name
            assert artifact.registers * artifact.num_warps * 32 <= REGISTERS, artifact.name
            assert artifact.spills <= limits.spills, artifact.name
            assert artifact.shared_memory_bytes <= limits.shared_memory_bytes, artifact.name

    def test_the_ptx_is_of_the_version_and_sm_asked_for(self, compiled: Compiled, target: Target) -> None:
        for _, ptx in compiled.kernels[target]:
            entry = read_entry(ptx)
            assert (entry.version, entry.sm) == (target.ptx_version, target.sm)
            version = f".version {target.ptx_version // 10}.{target.ptx_version % 10}\n"
            assert ptx.count(".version") == 1
            assert version in ptx

    def test_the_parameters_are_inputs_tokens_and_outputs(self, compiled: Compiled, target: Target) -> None:
        for artifact, ptx in compiled.kernels[target]:
            kernel = KERNELS[artifact.operator]
            types = [parameter.type for parameter in read_entry(ptx).parameters]
            assert types == ["u64"] * len(kernel.inputs) + ["u32"] + ["u64"] * len(kernel.outputs)
            names = [parameter.name for parameter in artifact.parameters]
            assert names == [*(one.name for one in kernel.inputs), "tokens", *(one.name for one in kernel.outputs)]
            check_contract(artifact, ptx)

    def test_it_multiplies_int8_where_it_should(self, compiled: Compiled, target: Target) -> None:
        for artifact, ptx in compiled.kernels[target]:
            if artifact.operator in ("ExpertUp", "ExpertDown"):
                products = ".s8.s8" if target.sm != 90 else ".s32.s8.s8"
                assert products in ptx, artifact.name

    def test_nothing_of_this_machine_is_in_it(self, compiled: Compiled, target: Target) -> None:
        for _, ptx in compiled.kernels[target]:
            assert "/" not in ptx.replace("//", "")
            assert ".loc" not in ptx


def test_each_operator_has_a_kernel_that_asks_for_no_more_shared_memory_than_any_block_gets(compiled: Compiled) -> None:
    kernels = [artifact for artifact, _ in compiled.kernels[FULL]]
    assert {one.operator for one in kernels if one.shared_memory_bytes <= DEFAULT_SHARED_BYTES} == set(KERNELS)


def test_kernels_of_16_bit_activations_compile(compiled: Compiled) -> None:
    for activation, pointer in (("float16", "*fp16"), ("bfloat16", "*bf16")):
        of_type = [
            msgspec.structs.replace(choice, activation=activation)
            for choice in wanted(OTHERS[0])
            if "A" in {one.dtype for one in (*choice.kernel.inputs, *choice.kernel.outputs)}
        ]
        seen = set()
        for artifact, ptx in compile_all(of_type, FULL, compiled.folder):
            check_contract(artifact, ptx)
            assert artifact.spills == 0
            seen |= {parameter.type for parameter in artifact.parameters}
        assert seen == {pointer, "*fp32", "*i8", "*i32", "i32"}


def test_widths_that_are_no_multiple_of_16_are_refused() -> None:
    with pytest.raises(SonoEdgeError, match="inner = 40 is no multiple of 16"):
        choices(experts_for(msgspec.structs.replace(SMALL, inner=40), 32), "float16", (32,), (1,))


# ------------------------------------------------------------------------------------------------- the cache
@pytest.fixture
def one() -> KernelChoice:
    """The kernel that compiles soonest."""
    return next(
        one for one in choices(experts_for(SMALL, 32), "float16", (32,), ()) if one.kernel.operator == "ExpertSum"
    )


def test_a_kernel_is_compiled_once(one: KernelChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kernel_cache.build(one.source(), 87, 92, tmp_path / "new")
    monkeypatch.setattr(kernel_cache, "compile_source", None)  # calling it would fail
    assert kernel_cache.build(one.source(), 87, 92, tmp_path / "new") == first
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_entry_is_built_again(one: KernelChoice, tmp_path: Path, damage: str) -> None:
    first = kernel_cache.build(one.source(), 87, 92, tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "changed": whole.replace(b"ld.global", b"st.global", 1),
        "empty": b"",
        "other": b'{"sha256": 3}',
    }
    assert damaged[damage] != whole
    entry.write_bytes(damaged[damage])
    assert kernel_cache.build(one.source(), 87, 92, tmp_path) == first
    assert entry.read_bytes() == whole


def test_all_that_a_kernel_is_made_of_is_in_its_key(one: KernelChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    source = one.source()
    keys = {
        kernel_cache.content_key(source, 87, 92),
        kernel_cache.content_key(source, 86, 92),
        kernel_cache.content_key(source, 87, 85),
        *(
            kernel_cache.content_key(msgspec.structs.replace(source, **{name: changed}), 87, 92)
            for name, changed in (
                ("constants", {**source.constants, "hidden": 64}),
                ("parameters", {**source.parameters, "y": "*bf16"}),
                ("num_warps", 8),
                ("num_stages", 2),
                ("function", other_source(one)),
            )
        ),
    }
    import triton

    monkeypatch.setattr(triton, "__version__", "0")
    keys.add(kernel_cache.content_key(source, 87, 92))
    assert len(keys) == 9
    assert kernel_cache.content_key(one.source(), 87, 92) not in keys - {kernel_cache.content_key(source, 87, 92)}


def other_source(one: KernelChoice) -> object:
    """Another kernel in the place of one."""
    from sonoedge.export.plugins import prefill

    return prefill.expert_up


def test_a_helper_that_changes_changes_the_key(tmp_path: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    keys = []
    for factor in (2, 3):
        path = tmp_path / f"changed_{factor}.py"
        path.write_text(
            "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef helper(value):\n"
            f"    return value * {factor}\n\n\n@triton.jit\ndef kernel(x, tokens, y):\n"
            "    tl.store(y, helper(tl.load(x)) + tokens)\n"
        )
        spec = spec_from_file_location("changed", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        source = Source(module.kernel, {"x": "*i32", "tokens": "i32", "y": "*i32"}, {}, 1, 1)
        keys.append(kernel_cache.content_key(source, 87, 92))
    assert keys[0] != keys[1]


def test_the_cache_is_where_other_programs_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_cache.cache_folder() == tmp_path / ".cache" / "sonoedge" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert kernel_cache.cache_folder() == tmp_path / ".cache" / "sonoedge" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "moved"))
    assert kernel_cache.cache_folder() == tmp_path / "moved" / "sonoedge" / "kernels"


def test_a_cache_that_cannot_be_written_is_refused(one: KernelChoice, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SonoEdgeError, match=r"where compiled kernels are kept, cannot be used .* set XDG_CACHE_HOME"):
        kernel_cache.build(one.source(), 87, 92, tmp_path / "file" / "kernels")


# ------------------------------------------------------------------------------- bundles, reports and refusals
def test_a_bundle_gets_its_kernels_and_their_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Compiled
) -> None:
    monkeypatch.setattr(kernel_set, "cache_folder", lambda: compiled.folder)
    kernel_set.write_kernels(lambda name: tmp_path / name, EXPERTS, "float32", PREFILL_TOKENS, [FULL])

    index = read_index(tmp_path)
    assert index.experts == EXPERTS
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", *(one.file for one in index.artifacts)}
    assert {artifact.operator for artifact in index.artifacts} == {one.operator for one in (*PREFILL, *DECODE)}
    assert {(artifact.sm, artifact.ptx) for artifact in index.artifacts} == {(87, 92)}
    for artifact in index.artifacts:
        check_contract(artifact, read_ptx(tmp_path, artifact))


def test_a_report_has_every_kernel_of_a_profile(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    profile = load_profile("jetson-orin-nano-8gb")
    assert profile.buckets is not None
    assert (1, *profile.buckets.prefill_tokens) == PREFILL_TOKENS

    def few(*given: object) -> list[KernelChoice]:
        """Those that are compiled for both PTX versions here."""
        assert given == (EXPERTS, "float32", PREFILL_TOKENS, (1,))
        return wanted(Target(87, 85))

    monkeypatch.setattr(kernel_set, "cache_folder", lambda: compiled.folder)
    monkeypatch.setattr(report, "choices", few)
    rows = report.rows(report.compile_for(ECHOVLM, profile))
    built = msgspec.to_builtins(rows)
    assert {(row["sm"], row["ptx"]) for row in built} == {(87, 92), (87, 85)}
    assert set(built[0]) == {"name", "sm", "ptx", "registers", "spills", "shared_memory_bytes"}
    assert len({(row["name"], row["ptx"]) for row in built}) == len(built) == 2 * len(KERNELS)
    names = {row["name"].partition("-")[0] for row in built}
    assert names == {kernel.function for kernel in KERNELS.values()}


def test_there_is_nothing_to_compile_for_a_dense_model_or_a_processor() -> None:
    assert report.compile_for(None, load_profile("jetson-orin-nano-8gb")) == []
    assert report.compile_for(ECHOVLM, load_profile("cpu-x86-64")) == []


def test_software_without_ahead_of_time_plugins_gets_no_kernels_in_a_bundle() -> None:
    orin = load_profile("jetson-orin-nano-8gb")
    assert targets(orin, plugins_only=True) == [Target(87, 92)]
    assert targets(orin, plugins_only=False) == [Target(87, 92), Target(87, 85)]
    assert targets(load_profile("rtx-sm86"), plugins_only=True) == []


def test_a_kernel_that_needs_scratch_memory_is_refused(monkeypatch: pytest.MonkeyPatch, one: KernelChoice) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    make = CUDABackend.make_llir

    def with_scratch(self: object, source: object, metadata: dict[str, object], *rest: object) -> object:
        made = make(self, source, metadata, *rest)
        metadata["global_scratch_size"] = 128
        return made

    monkeypatch.setattr(CUDABackend, "make_llir", with_scratch)
    with pytest.raises(SonoEdgeError, match="expert_sum needs scratch memory"):
        compile_source(one.source(), 87, 92)


def test_a_ptx_that_differs_from_its_artifact_is_refused(compiled: Compiled) -> None:
    artifact, ptx = compiled.kernels[FULL][0]
    more = (*artifact.parameters, Parameter("scratch", "*i8"))
    for name, changed, what in (
        ("entry", "other", "entry is expert_route and the index says other"),
        ("sm", 86, "SM is 87 and the index says 86"),
        ("ptx", 85, "PTX version is 92 and the index says 85"),
        ("num_warps", 8, "threads of a block is 128 and the index says 256"),
        ("parameters", more, "parameters is "),
        ("parameters", artifact.parameters[::-1], "parameters is "),
    ):
        with pytest.raises(SonoEdgeError, match=what):
            check_contract(msgspec.structs.replace(artifact, **{name: changed}), ptx)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="cannot be read"):
        read_index(tmp_path)
    (tmp_path / "kernels.json").write_text('{"activation": "float8"}')
    with pytest.raises(SonoEdgeError, match=r"kernels\.json is damaged .*: build the bundle again"):
        read_index(tmp_path)
    empty = {"format_version": 2, "activation": "float16", "experts": Experts(1, 1, 16, 16, False), "artifacts": []}
    (tmp_path / "kernels.json").write_bytes(msgspec.json.encode(empty))
    with pytest.raises(SonoEdgeError, match="has format_version 2 and this SonoEdge reads 1"):
        read_index(tmp_path)
