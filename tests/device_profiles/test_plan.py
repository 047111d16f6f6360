"""Plans grow and shrink as the numbers that they are made from say, and are silent where a number is unknown."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.device_profiles import load_profile
from sonoedge.device_profiles.advice import Student, advise
from sonoedge.device_profiles.memory_plan import Use, cache_bytes, plan_memory
from sonoedge.device_profiles.planning import Model, Plan, choose_mode, make_plan
from sonoedge.device_profiles.roofline import StageTime, Work, decoder_work, stage_time, vision_work
from sonoedge.device_profiles.schema import Efficiency, Mode, Profile
from sonoedge.device_profiles.shape import (
    INT8,
    Experts,
    Formats,
    ModelShape,
    VisionShape,
    WeightFormat,
    weigh,
)
from sonoedge.errors import SonoEdgeError

ECHOVLM = ModelShape(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    dense_width=18944,
    vocab=152064,
    tied=False,
    experts=Experts(count=4, chosen=2, width=1408, shared_width=5632),
    vision=VisionShape(layers=32, width=1280, heads=16, mlp_width=5120, patch_values=1176),
)
USE = Use(
    context=1024,
    image_tokens=196,
    int8_products=True,
    prefix_tokens=212,
    question_tokens=10,
    hint_tokens=80,
    hint_rows=26,
)
AGX, NANO = load_profile("jetson-agx-orin-64gb"), load_profile("jetson-orin-nano-8gb")
RTX, CPU = load_profile("rtx-sm86"), load_profile("cpu-x86-64")
DEVICES = st.sampled_from([AGX, NANO, RTX, CPU])


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Models of any kind: with and without experts, dense path, shared expert and vision tower."""
    small = st.integers(1, 8)
    kv_heads, groups, head_dim = draw(small), draw(st.integers(1, 4)), 16 * draw(small)
    experts = None
    if draw(st.booleans()):
        count = draw(small)
        experts = Experts(count, draw(st.integers(1, count)), 16 * draw(small), draw(st.sampled_from([0, 64])))
    vision = None
    if draw(st.booleans()):
        heads = draw(st.integers(1, 4))
        vision = VisionShape(draw(small), 16 * heads, heads, 16 * draw(small), patch_values=1176)
    return ModelShape(
        hidden=16 * draw(small),
        layers=draw(small),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dense_width=draw(st.sampled_from([64, 512])) if experts is None else draw(st.sampled_from([0, 64, 512])),
        vocab=draw(st.integers(2, 5000)),
        tied=draw(st.booleans()),
        experts=experts,
        vision=vision,
    )


def _model(shape: ModelShape = ECHOVLM, **changes: object) -> Model:
    return Model("model", shape, weigh(shape), msgspec.structs.replace(USE, **changes))


def _plan(model: Model, device: Profile = AGX) -> Plan:
    return make_plan(model, device, device.modes[0])


def _decode(plan: Plan) -> StageTime:
    return plan.stages[-1].time


def _sooner(one: float | None, other: float | None) -> bool:
    return one is other is None or (one is not None and other is not None and one <= other)


@given(shapes(), DEVICES, st.integers(256, 4096), st.integers(0, 4096))
def test_a_longer_context_never_takes_less(shape: ModelShape, device: Profile, context: int, more: int) -> None:
    short, long = (_plan(_model(shape, context=context + extra), device) for extra in (0, more))
    assert short.memory.serving_bytes <= long.memory.serving_bytes
    assert short.memory.building_bytes <= long.memory.building_bytes
    assert _decode(short).work.bytes <= _decode(long).work.bytes
    assert _sooner(_decode(short).at_least_ms, _decode(long).at_least_ms)


@given(shapes(), DEVICES, st.integers(1, 8))
def test_more_layers_never_take_less(shape: ModelShape, device: Profile, more: int) -> None:
    deeper = msgspec.structs.replace(shape, layers=shape.layers + more)
    few, many = (_plan(_model(each), device) for each in (shape, deeper))
    assert few.parameters < many.parameters
    assert few.memory.serving_bytes < many.memory.serving_bytes
    assert few.memory.building_bytes <= many.memory.building_bytes
    for before, after in zip(few.stages, many.stages, strict=True):
        assert before.time.work.bytes < after.time.work.bytes or before.name == "vision"
        assert _sooner(before.time.at_least_ms, after.time.at_least_ms)
        assert _sooner(before.time.expected_ms, after.time.expected_ms)


@given(shapes(), st.floats(10, 500), st.floats(1, 10), st.floats(0.1, 1), st.floats(0.1, 0.5))
def test_a_faster_device_is_never_slower(
    shape: ModelShape, bandwidth: float, factor: float, decode: float, prefill: float
) -> None:
    slow = Mode("slow", 15.0, bandwidth, 20.0, 10.0)
    faster = [
        msgspec.structs.replace(slow, bandwidth_gb_s=bandwidth * factor),
        msgspec.structs.replace(slow, int8_dense_tops=20.0 * factor),
        msgspec.structs.replace(slow, fp16_dense_tflops=10.0 * factor),
    ]
    device = msgspec.structs.replace(AGX, efficiency=Efficiency(decode, prefill, prefill))
    before = make_plan(_model(shape), device, slow)
    for mode in faster:
        after = make_plan(_model(shape), device, mode)
        for slower, sooner in zip(before.stages, after.stages, strict=True):
            assert _sooner(sooner.time.at_least_ms, slower.time.at_least_ms)
            assert _sooner(sooner.time.expected_ms, slower.time.expected_ms)


@given(shapes(), DEVICES)
def test_sums_add_up_and_bounds_hold(shape: ModelShape, device: Profile) -> None:
    plan = _plan(_model(shape), device)
    assert plan.memory.serving_bytes == sum(need.bytes for need in plan.memory.serving)
    assert all(need.bytes > 0 for need in (*plan.memory.serving, *plan.memory.building))
    for stage in plan.stages:
        assert stage.rows >= stage.tokens
        time = stage.time
        if time.expected_ms is not None and stage.name == "decode":
            assert time.at_least_ms is not None
            assert time.at_least_ms < time.expected_ms
    if shape.vision is not None and plan.frame_to_hints is not None:
        parts = [stage.time.at_least_ms for stage in plan.stages if stage.name in ("vision", "prefill", "hints")]
        known = [part for part in parts if part is not None]
        assert plan.frame_to_hints.at_least_ms == (sum(known) if len(known) == len(parts) else None)


@given(shapes().filter(lambda shape: shape.experts is not None), st.integers(2, 64))
def test_one_token_reads_the_chosen_experts_and_many_read_all(shape: ModelShape, rows: int) -> None:
    experts = shape.experts
    assert experts is not None
    weights = weigh(shape)
    one, many = (
        decoder_work(shape, weights, rows=n, seen=64, logits_rows=1, cache_bits=16, int8=False) for n in (1, rows)
    )
    each = weights.experts // experts.count
    assert one.bytes == many.bytes - each * (min(experts.count, rows * experts.chosen) - experts.chosen)
    all_read = msgspec.structs.replace(shape, experts=msgspec.structs.replace(experts, chosen=experts.count))
    dense = decoder_work(all_read, weights, rows=1, seen=64, logits_rows=1, cache_bits=16, int8=False)
    assert dense.bytes - one.bytes == each * (experts.count - experts.chosen)


def test_a_token_of_echovlm_reads_what_it_is_multiplied_with() -> None:
    """By hand: all weights but the embeddings, the vision tower and two of four experts."""
    weights = weigh(ECHOVLM)
    work = decoder_work(ECHOVLM, weights, rows=1, seen=0, logits_rows=1, cache_bits=16, int8=False)
    assert work.bytes == weights.layers + weights.experts // 2 + weights.head
    read = ECHOVLM.parameters - 152064 * 3584 - 28 * 2 * 3 * 3584 * 1408 - 675_759_104  # the tower's parameters
    assert work.operations == pytest.approx(2 * read, rel=1e-3)


def test_int4_keeps_what_is_not_quantized() -> None:
    form = WeightFormat(bits=4, scale_bits=16, group=128)
    assert form.size((10, 256)) == 10 * 256 // 2 + 10 * 2 * 2
    assert form.size((10, 200)) == 10 * 200 // 2 + 10 * 2 * 2  # the last group of a row is short
    half = WeightFormat(bits=16)
    weights = weigh(ECHOVLM, Formats(layers=form, head=half, embeddings=half, vision=half, vector_bits=16))
    assert weights.head == weights.embeddings == 2 * 152064 * 3584
    assert weights.stored < 0.75 * weigh(ECHOVLM).stored


def test_tied_weights_are_stored_once_and_read_as_the_head() -> None:
    tied = msgspec.structs.replace(ECHOVLM, tied=True)
    ends = INT8.head.size((152064, 3584))
    assert weigh(ECHOVLM).stored - weigh(tied).stored == ends
    assert weigh(tied).head == ends


def test_the_released_model_fits_the_large_jetson_and_not_the_small_one() -> None:
    assert ECHOVLM.parameters == pytest.approx(11.7e9, rel=0.005)
    half = WeightFormat(bits=16)
    bf16 = weigh(ECHOVLM, Formats(layers=half, head=half, embeddings=half, vision=half, vector_bits=16))
    assert bf16.stored == pytest.approx(23.4e9, rel=0.005)
    assert weigh(ECHOVLM).stored == pytest.approx(11.7e9, rel=0.01)
    assert _plan(_model(), AGX).fits is True
    small = _plan(_model(), NANO)
    assert small.fits is False
    assert small.memory.serving_bytes > NANO.memory.capacity_bytes  # type: ignore[operator]  # both known


@pytest.mark.parametrize("name", ["jetson-orin-nano-8gb", "jetson-orin-nx-8gb", "jetson-orin-nx-16gb"])
def test_the_advised_student_fits_and_no_larger_one_would(name: str) -> None:
    device, model = load_profile(name), _model()
    student = advise(model, device).student
    assert student is not None
    planned = _plan(_model(student.shape), device)
    assert planned.fits is True
    assert planned.memory.peak_bytes == student.peak_bytes
    assert (planned.parameters, student.parameters) == (student.shape.parameters, planned.parameters)
    room = planned.memory.room_bytes
    assert room is not None
    assert student.peak_bytes > 0.9 * room  # one step of 64 larger does not fit
    _check_cut(student)


def _check_cut(student: Student) -> None:
    """What `sonoedge distill` asks of a student: no size above the teacher's; widths as the kernels take them."""
    assert student.shape.hidden == ECHOVLM.hidden
    assert 1 <= student.layers < ECHOVLM.layers
    assert ECHOVLM.vision is not None
    assert 1 <= student.vision_layers <= ECHOVLM.vision.layers
    for width in (student.intermediate_size, student.expert_size, student.shared_expert_size, student.vision_mlp_size):
        assert width >= 16
        assert width % 16 == 0


def test_no_student_where_what_it_keeps_is_too_large() -> None:
    small = load_profile("jetson-orin-nano-4gb")
    advice = advise(_model(), small)
    assert advice.student is None
    assert advice.kept_bytes == 2 * INT8.head.size((152064, 3584))
    assert all(not change.enough for change in advice.changes)


def test_changes_say_what_they_save() -> None:
    host = msgspec.structs.replace(
        CPU, memory=msgspec.structs.replace(CPU.memory, capacity_bytes=24 * 10**9, system_bytes=10**9)
    )
    model = _model(one_token_form=True)
    now = plan_memory(model.shape, model.weights, model.use, host)
    assert now.fits is False
    changes = {change.change.split(" = ")[0]: change for change in advise(model, host).changes}
    assert set(changes) == {"graphs", "limits.context", "cache", "98 image tokens instead of 196"}
    assert changes["graphs"].serving_saves_bytes == now.second_form_bytes
    assert changes["graphs"].enough
    cache = cache_bytes(model.shape, 1024, model.use, host)
    assert changes["cache"].serving_saves_bytes == cache * 3 // 4
    assert not changes["cache"].enough
    assert changes["limits.context"].serving_saves_bytes >= cache // 2


def test_tensorrt_keeps_a_16_bit_cache_whatever_is_asked() -> None:
    asked = _model(int8_cache=True)
    assert _plan(asked, AGX).memory.serving == _plan(_model(), AGX).memory.serving
    assert not any("cache" in change.change for change in advise(asked, NANO).changes)


def test_a_build_keeps_two_copies_where_host_and_gpu_share_memory() -> None:
    model = _model()
    shared, apart, none = (_plan(model, device).memory for device in (AGX, RTX, CPU))
    assert shared.building[0].bytes == 2 * model.weights.decoder
    assert apart.building[0].bytes == model.weights.decoder
    assert none.building == ()
    assert shared.peak_bytes == shared.building_bytes > shared.serving_bytes


def test_static_sizes_fill_passes_up() -> None:
    static, free = _plan(_model(), AGX), _plan(_model(), CPU)
    assert [(stage.name, stage.tokens) for stage in static.stages] == [
        ("vision", 196),
        ("prefill", 212),
        ("hints", 80),
        ("question", 222),
        ("decode", 1),
    ]
    assert [stage.rows for stage in static.stages] == [196, 256, 256, 256, 1]
    assert [stage.rows for stage in free.stages] == [196, 212, 80, 222, 1]
    assert static.stages[1].time.work.int8_operations > free.stages[1].time.work.int8_operations


def test_without_a_tokenizer_prompts_are_unknown() -> None:
    plan = _plan(_model(prefix_tokens=None, question_tokens=None, hint_tokens=None, hint_rows=None))
    assert [stage.name for stage in plan.stages] == ["vision", "decode"]
    assert plan.frame_to_hints is plan.first_token is None
    assert plan.tokens_s_expected is not None


def test_what_a_profile_does_not_know_no_plan_says() -> None:
    plan = _plan(_model(), CPU)
    assert plan.fits is None
    for stage in plan.stages:
        assert stage.time.at_least_ms is stage.time.expected_ms is None
        assert "bandwidth_gb_s" in (stage.time.unknown or "")
    assert plan.tokens_s_at_most is plan.tokens_s_expected is None
    assert plan.frame_to_hints is not None
    assert plan.frame_to_hints.at_least_ms is None


def test_without_an_efficiency_there_is_a_bound_only() -> None:
    bare = msgspec.structs.replace(AGX, efficiency=Efficiency("unknown", "unknown", "unknown"))
    for stage in _plan(_model(), bare).stages:
        assert stage.time.at_least_ms is not None
        assert stage.time.expected_ms is None
        assert "nobody has published" in (stage.time.unknown or "")
    half = msgspec.structs.replace(AGX, efficiency=Efficiency(0.8, "unknown", 0.2))
    known = {stage.name: stage.time.expected_ms is not None for stage in _plan(_model(), half).stages}
    assert known == {"vision": True, "prefill": False, "hints": False, "question": False, "decode": True}


def test_a_roofline_by_hand() -> None:
    mode = Mode("any", 10.0, 100.0, 20.0, 10.0)
    reading = stage_time(Work(10**9, 0, 10**9), mode, of_bandwidth=0.5, of_int8_rate="unknown")
    assert reading.at_least_ms == pytest.approx(10.0)
    assert reading.bound_by == "memory"
    assert reading.expected_ms == pytest.approx(20.0)
    computing = stage_time(Work(10**6, 10**12, 10**12), mode, of_bandwidth=0.5, of_int8_rate=0.25)
    assert computing.at_least_ms == pytest.approx(50.0 + 100.0)
    assert computing.bound_by == "arithmetic"
    assert computing.expected_ms == pytest.approx(400.0)


def test_a_vision_tower_by_hand() -> None:
    shape = msgspec.structs.replace(
        ECHOVLM, hidden=8, vision=VisionShape(layers=2, width=4, heads=1, mlp_width=16, patch_values=6)
    )
    work = vision_work(shape, weigh(shape), patches=8, int8=True)
    block = 3 * 4 * 4 + 4 * 4 + 2 * 4 * 16
    assert work.int8_operations == 2 * (8 * (6 * 4 + 2 * block) + 2 * (16 * 16 + 16 * 8))
    assert work.float_operations == 4 * 8 * 8 * 4 * 2


def test_modes_are_chosen_by_name() -> None:
    assert choose_mode(NANO, None) is NANO.modes[0]
    assert choose_mode(NANO, "15W").bandwidth_gb_s == 68.3
    with pytest.raises(SonoEdgeError, match="jetson-orin-nano-8gb has no mode '10W': choose MAXN_SUPER, 25W, 15W"):
        choose_mode(NANO, "10W")
