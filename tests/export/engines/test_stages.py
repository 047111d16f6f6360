"""Which graph each engine is built from: what the library can do decides, and what the bundle carries."""

from collections.abc import Callable

import msgspec
import pytest

from sonoedge.bundle import Bundle, BundleWriter, Contents, DecoderSpec, ExpertsSpec, Graph, open_bundle
from sonoedge.device_profiles.schema import Buckets
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.library import Abilities
from sonoedge.export.engines.stages import Plan, plan_stages

BUCKETS = Buckets((64, 196), (32, 256), (128, 1024))
CONTEXT = 200
NEW = Abilities(plugins=True, cache_in_place=True, decode_rows=1)
OLD = Abilities(plugins=False, cache_in_place=False, decode_rows=1)
PORTABLE = Abilities(plugins=False, cache_in_place=True, decode_rows=2)

Carry = Callable[..., Bundle]


@pytest.fixture
def carry(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Carry:
    """A bundle with graphs such as "decoder.trt" in its manifest, which nobody reads."""

    def make(*graphs: str, kernels: bool = False, experts: bool = True) -> Bundle:
        root = tmp_path_factory.mktemp("carry") / "bundle"
        with BundleWriter(root) as writer:
            listed = []
            for name in graphs:
                purpose, _, formulation = name.partition(".")
                writer.add(f"graphs/{name}.onnx").write_text(name)
                listed.append(Graph(purpose, formulation, f"graphs/{name}.onnx"))  # type: ignore[arg-type]
            writer.add("golden/inputs.npz").write_bytes(b"inputs")
            if kernels:
                writer.add("kernels/kernels.json").write_text("{}")
            spec: DecoderSpec = msgspec.structs.replace(contents.decoder, context=CONTEXT)
            described = msgspec.structs.replace(
                contents,
                decoder=spec,
                graphs=tuple(listed),
                experts=ExpertsSpec(4, 2, 32, 16, False) if experts else None,
                kernels="kernels/kernels.json" if kernels else None,
            )
            writer.commit(described)
        return open_bundle(root)

    return make


ALL = ("vision.trt", "decoder.trt", "vision.qdq", "decoder.qdq", "decoder.trt-plugins", "decode.trt-plugins")


def told(plan: Plan) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """Stage → its graph, and (rows, seen) of its buckets."""
    return {stage.name: (stage.graph.stem, [(b.rows, b.seen) for b in stage.buckets]) for stage in plan.stages}


def test_plugins_have_an_engine_of_their_own_for_one_token(carry: Carry) -> None:
    plan = plan_stages(carry(*ALL, kernels=True), BUCKETS, NEW)
    assert plan.experts == "plugins"
    assert told(plan) == {
        "vision": ("vision.trt", [(256, 0), (784, 0)]),
        "decoder": ("decoder.trt-plugins", [(32, 128), (32, 200), (200, 200)]),
        "decode": ("decode.trt-plugins", [(1, 128), (1, 200)]),
    }
    pasts = {extents["past_key_0"].most for stage in plan.stages[1:] for extents in stage.extents}
    assert pasts == {(1, 1, CONTEXT + 200, 4)}  # engines of one decoder share one cache


@pytest.mark.parametrize(
    ("abilities", "kernels"), [(PORTABLE, True), (msgspec.structs.replace(NEW, decode_rows=2), False)]
)
def test_without_plugins_one_engine_serves_many_tokens_and_one(
    abilities: Abilities, kernels: bool, carry: Carry
) -> None:
    plan = plan_stages(carry(*ALL, kernels=kernels), BUCKETS, abilities)
    assert plan.experts == "functions"
    assert told(plan)["decoder"] == ("decoder.trt", [(32, 128), (32, 200), (200, 200), (2, 128), (2, 200)])
    assert "decode" not in told(plan)
    assert all(stage.cache_in_place for stage in plan.stages)


def test_a_library_without_the_newer_operators_gets_the_portable_graphs(carry: Carry) -> None:
    plan = plan_stages(carry(*ALL, kernels=True), BUCKETS, OLD)
    assert plan.experts == "functions"
    assert told(plan) == {
        "vision": ("vision.qdq", [(256, 0), (784, 0)]),
        "decoder": ("decoder.qdq", [(1, 201), (32, 232), (200, 400)]),
    }
    assert not any(stage.cache_in_place for stage in plan.stages)
    assert {extents["past_key_0"].most for extents in plan.stages[1].extents} == {(1, 1, CONTEXT, 4)}


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("decoder", ("decoder.trt", "decode.trt-plugins")), ("decode", ("decoder.trt-plugins", None))],
)
def test_a_scheme_with_half_of_the_kernels_uses_that_half(
    missing: str, expected: tuple[str, str | None], carry: Carry
) -> None:
    plan = plan_stages(carry(*(name for name in ALL if name != f"{missing}.trt-plugins"), kernels=True), BUCKETS, NEW)
    assert plan.experts == "plugins"
    graphs = {stage.name: stage.graph.stem for stage in plan.stages}
    assert (graphs["decoder"], graphs.get("decode")) == expected


def test_a_dense_model_has_no_experts(carry: Carry) -> None:
    assert plan_stages(carry("vision.trt", "decoder.trt", experts=False), BUCKETS, NEW).experts == "none"


@pytest.mark.parametrize(
    ("graphs", "abilities", "missing"),
    [
        (("vision.ort", "decoder.ort"), PORTABLE, "vision graph in the formulation trt"),
        (("vision.trt", "decoder.ort"), PORTABLE, "decoder graph in the formulation trt"),
        (("vision.trt", "decoder.trt"), OLD, "vision graph in the formulation qdq"),
    ],
)
def test_a_bundle_without_the_graphs_is_refused(
    graphs: tuple[str, ...], abilities: Abilities, missing: str, carry: Carry
) -> None:
    with pytest.raises(SonoEdgeError, match=f"no {missing}: build the bundle again"):
        plan_stages(carry(*graphs), BUCKETS, abilities)
