"""Profiles are checked when they are loaded: every key known, every number with its source, every fact as published."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.device_profiles import Profile, list_profiles, load_profile
from sonoedge.device_profiles.schema import Buckets, check_sources
from sonoedge.errors import SonoEdgeError

PACKAGED = Path(load_profile.__code__.co_filename).parent


class Facts(NamedTuple):
    """What NVIDIA publishes of one device."""

    sm: int
    cuda_cores: int
    tensor_cores: int
    memory_gib: int
    memory_bits: int  # 0: no memory clock is published
    cpu_cores: int  # 0: differs from host to host
    modes: dict[str, tuple[int, float, int]]  # mode → tensor cores left on, GPU clock in MHz, memory clock in MHz


SLOW, FAST = 2133, 3199
FACTS = {
    "jetson-agx-orin-32gb": Facts(
        *(87, 1792, 56, 32, 256, 8),
        {
            "MAXN_SUPER": (56, 1300, FAST),
            "MAXN": (56, 930.75, FAST),
            "MODE_40W": (56, 816, FAST),
            "MODE_30W": (32, 612, FAST),
            "MODE_15W": (24, 408, SLOW),
        },
    ),
    "jetson-agx-orin-64gb": Facts(
        *(87, 2048, 64, 64, 256, 12),
        {
            "MAXN": (64, 1301, FAST),
            "MODE_50W": (64, 816, FAST),
            "MODE_30W": (32, 612, FAST),
            "MODE_15W": (24, 408, SLOW),
        },
    ),
    "jetson-orin-nano-4gb": Facts(
        *(87, 512, 16, 4, 64, 6),
        {
            "MAXN_SUPER": (16, 1020, FAST),
            "25W": (16, 1020, FAST),
            "10W": (16, 612, SLOW),
            "7W_AI": (16, 408, SLOW),
            "7W_CPU": (16, 306, SLOW),
        },
    ),
    "jetson-orin-nano-8gb": Facts(
        *(87, 1024, 32, 8, 128, 6),
        {"MAXN_SUPER": (32, 1020, FAST), "25W": (32, 918, FAST), "15W": (32, 612, SLOW), "7W": (16, 408, SLOW)},
    ),
    "jetson-orin-nx-16gb": Facts(
        *(87, 1024, 32, 16, 128, 8),
        {
            "MAXN_SUPER": (32, 1173, FAST),
            "40W": (32, 1173, FAST),
            "MAXN": (32, 918, FAST),
            "25W": (32, 408, FAST),
            "15W": (16, 612, FAST),
            "10W": (16, 612, SLOW),
        },
    ),
    "jetson-orin-nx-8gb": Facts(
        *(87, 1024, 32, 8, 128, 6),
        {
            "MAXN_SUPER": (32, 1173, FAST),
            "40W": (32, 1173, FAST),
            "MAXN": (32, 765, FAST),
            "20W": (32, 408, FAST),
            "15W": (16, 612, FAST),
            "10W": (16, 612, SLOW),
        },
    ),
    # Thor's tensor cores are counted differently (96 in 20 multiprocessors): here by four to a multiprocessor left on.
    "jetson-thor-t4000": Facts(110, 1536, 64, 64, 256, 12, {"MAXN": (48, 1530, 4266), "70W": (48, 1530, 4266)}),
    "jetson-thor-t5000": Facts(
        *(110, 2560, 96, 128, 256, 14),
        {
            "MAXN": (80, 1575, 4266),
            "120W": (80, 1386, 4266),
            "90W": (48, 1530, 4266),
            "70W": (48, 1530, 4266),
        },
    ),
    "rtx-sm120": Facts(120, 4352, 136, 16, 0, 0, {"as shipped": (136, 1950, 0)}),
    "rtx-sm86": Facts(86, 3328, 104, 12, 0, 0, {"as shipped": (104, 1200, 0)}),
    "rtx-sm89": Facts(89, 2816, 88, 16, 0, 0, {"as shipped": (88, 2130, 0)}),
}
OPERATIONS = {87: 1024, 110: 4096, 86: 512, 89: 512, 120: 512}  # SM → INT8 operations a tensor core a clock
IDS = ["cpu-aarch64", "cpu-x86-64", *FACTS]
PTX_OF_CUDA = {"12.6": 85, "13.0": 90, "13.2": 92}


def test_every_packaged_profile_loads_under_its_own_name() -> None:
    assert [profile.id for profile in list_profiles()] == IDS
    assert len(IDS) == 13
    for name in IDS:
        assert load_profile(name).id == name
        assert load_profile(PACKAGED / f"{name}.toml") == load_profile(name)


@pytest.mark.parametrize("name", FACTS)
def test_the_hardware_is_as_published(name: str) -> None:
    profile, facts = load_profile(name), FACTS[name]
    assert profile.gpu is not None
    assert (profile.gpu.sm, profile.gpu.cuda_cores, profile.gpu.tensor_cores) == facts[:3]
    assert profile.memory.capacity_bytes == facts.memory_gib * 2**30
    assert profile.cpu.cores == (facts.cpu_cores or "unknown")
    assert profile.backend == "tensorrt"
    assert profile.memory.shared_with_gpu is name.startswith("jetson")
    assert profile.cpu.architecture == ("aarch64" if name.startswith("jetson") else "x86-64")


@pytest.mark.parametrize("name", FACTS)
def test_rates_are_the_clocks_arithmetic(name: str) -> None:
    """Dense INT8 is tensor cores x operations x clock, FP16 half of it, bandwidth bits x 2 x clock."""
    profile, facts = load_profile(name), FACTS[name]
    assert [mode.name for mode in profile.modes] == list(facts.modes)
    for mode in profile.modes:
        tensor_cores, clock_mhz, memory_mhz = facts.modes[mode.name]
        int8_tops = tensor_cores * OPERATIONS[facts.sm] * clock_mhz / 1e6
        assert mode.int8_dense_tops == pytest.approx(int8_tops, abs=0.06)
        assert mode.fp16_dense_tflops == pytest.approx(int8_tops / 2, abs=0.06)
        if facts.memory_bits:
            assert mode.bandwidth_gb_s == pytest.approx(facts.memory_bits / 8 * 2 * memory_mhz / 1e3, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "sparse_int8_tops"),
    [
        ("jetson-agx-orin-64gb", 170),
        ("jetson-agx-orin-32gb", 241 - 92),  # what is left without the DLA cores
        ("jetson-orin-nano-8gb", 67),
        ("jetson-orin-nano-4gb", 34),
        ("jetson-thor-t5000", 1035),
        ("jetson-thor-t4000", 1200 / 2),  # of FP4
        ("rtx-sm86", 2 * 63.9),  # of FP16
        ("rtx-sm89", 191.9),
        ("rtx-sm120", 545 / 2),  # of FP4
    ],
)
def test_rates_agree_with_the_headline_of_the_data_sheet(name: str, sparse_int8_tops: float) -> None:
    assert load_profile(name).modes[0].int8_dense_tops == pytest.approx(sparse_int8_tops / 2, rel=0.02)


@pytest.mark.parametrize("name", FACTS)
def test_modes_go_from_the_fastest_down_and_name_their_power(name: str) -> None:
    profile = load_profile(name)
    rates = [mode.int8_dense_tops for mode in profile.modes]
    assert rates == sorted(rates, reverse=True)
    bandwidths = {mode.bandwidth_gb_s for mode in profile.modes}
    assert profile.modes[0].bandwidth_gb_s == max(bandwidths)
    for mode in profile.modes:
        named = re.search(r"(\d+)W", mode.name)
        assert mode.watts == (float(named[1]) if named else 70 if profile.device_class == "rtx" else "unknown")


@pytest.mark.parametrize("name", IDS)
def test_software_is_as_released(name: str) -> None:
    profile = load_profile(name)
    assert (profile.software == ()) is (profile.device_class == "cpu")
    for software in profile.software:
        assert software.ptx_version == PTX_OF_CUDA[software.cuda]
        version = tuple(map(int, software.builder_version.split(".")))
        assert software.ahead_of_time_plugins is (software.builder == "tensorrt" and version >= (10, 9))
    jetpacks = [s.version for s in profile.software if s.name == "JetPack"]
    assert jetpacks == {"orin": ["7.2", "6.2.2"], "thor": ["7.2"]}.get(profile.device_class, [])
    if profile.device_class == "rtx":
        assert [(s.builder, s.builder_version) for s in profile.software] == [("tensorrt_rtx", "1.7")]


@pytest.mark.parametrize("name", IDS)
def test_precisions_are_those_of_the_tensor_cores(name: str) -> None:
    profile = load_profile(name)
    sm = 0 if profile.gpu is None else profile.gpu.sm
    assert {"int8", "int4", "float32"} <= set(profile.precisions)
    assert len(set(profile.precisions)) == len(profile.precisions)
    assert ("fp8" in profile.precisions) is (sm >= 89)
    assert ("fp4" in profile.precisions) is (sm >= 100)
    assert ({"float16", "bfloat16"} <= set(profile.precisions)) is (sm >= 80)
    if profile.device_class == "orin":
        assert profile.precisions == ("float32", "float16", "bfloat16", "int8", "int4")


@pytest.mark.parametrize("name", IDS)
def test_buckets_hold_one_picture_and_a_question_about_it(name: str) -> None:
    profile = load_profile(name)
    if profile.device_class == "cpu":
        assert profile.buckets is None  # shapes are dynamic
        return
    assert profile.buckets is not None
    assert profile.buckets.image_tokens[-1] == 196  # what EchoVLM was trained with at most
    assert any(196 < tokens <= 256 for tokens in profile.buckets.prefill_tokens)
    assert profile.buckets.prefill_tokens[0] <= 32  # a hint's question alone
    assert profile.buckets.context_tokens[0] >= 512


@pytest.mark.parametrize("name", IDS)
def test_the_system_leaves_room(name: str) -> None:
    memory = load_profile(name).memory
    if memory.system_bytes == "unknown":
        assert not name.startswith("jetson") or name == "jetson-thor-t4000"
        return
    assert memory.capacity_bytes != "unknown"
    assert 2**30 < memory.system_bytes < 0.3 * memory.capacity_bytes


@pytest.mark.parametrize("name", IDS)
def test_every_number_names_its_source(name: str) -> None:
    profile = load_profile(name)
    assert all(text.strip() for text in profile.sources.values())
    for key in profile.sources:
        left = {other: text for other, text in profile.sources.items() if other != key}
        with pytest.raises(SonoEdgeError, match="names no source"):
            check_sources(msgspec.structs.replace(profile, sources=left))


def test_the_table_has_a_line_for_each_profile_and_fits(
    sonoedge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    heading, *lines, caption = sonoedge("profiles").out.splitlines()
    assert heading.split() == ["profile", "device", "SM", "GiB", "GB/s", "INT8", "TOPS", "software"]
    assert "fastest power mode" in caption
    assert [line.split()[0] for line in lines] == IDS  # no line is wrapped
    by_id = {line.split()[0]: line for line in lines}
    assert "NVIDIA Jetson Orin Nano 8GB" in by_id["jetson-orin-nano-8gb"]
    assert by_id["jetson-orin-nano-8gb"].split()[-6:] == ["87", "8", "102.4", "33.4", "JetPack", "7.2"]
    assert by_id["cpu-x86-64"].split()[-5:] == ["-", "unknown", "unknown", "unknown", "-"]


def test_json_shows_everything(sonoedge: Callable[..., Any]) -> None:
    found = json.loads(sonoedge("profiles", "--json").last_line)["profiles"]
    assert msgspec.convert(found, list[Profile]) == list_profiles()
    assert {"memory", "modes", "precisions", "software", "buckets", "efficiency", "sources"} <= set(found[-1])


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(SonoEdgeError, match=rf"unknown profile 'jetson-nano': choose {', '.join(IDS)}, or name a TOML"):
        load_profile("jetson-nano")


def _edited(tmp_path: Path, old: str, new: str, name: str = "jetson-orin-nano-8gb") -> Path:
    text = (PACKAGED / f"{name}.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", IDS)
def test_a_file_of_the_users_own_works_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = _edited(tmp_path, f'id = "{name}"', 'id = "mine"', name)
    expected = msgspec.structs.replace(load_profile(name), id="mine")
    monkeypatch.chdir(tmp_path)
    for given_as in (path, str(path), "mine.toml", "./mine.toml"):
        assert load_profile(given_as) == expected


BUCKETS = """[buckets]
image_tokens = [64, 196]
prefill_tokens = [32, 256, 1024]
context_tokens = [512, 2048]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 6", "cores = -6", "cpu.cores = -6: Expected `int` >= 1"),
        ("cores = 6", 'cores = "six"', "cpu.cores = 'six': "),
        ("cores = 6", "cores = 99999999999999999999", "cpu.cores = 99999999999999999999: Expected `int` <= "),
        ("watts = 25", "watt = 25", "modes[1]: Object contains unknown field `watt`"),
        ("watts = 25", "watts = inf", "modes[1].watts = inf: Expected `float` <= "),
        ("watts = 25", "watts = nan", "modes[1].watts = nan: Expected `float` > 0"),
        ("watts = 25", "watts = 0", "modes[1].watts = 0: Expected `float` > 0"),
        ("bandwidth_gb_s = 102.4", "bandwidth_gb_s = true", "modes[0].bandwidth_gb_s = True: Expected"),
        ('backend = "tensorrt"', 'backend = "tensorflow"', "backend = 'tensorflow': Invalid enum value"),
        ('backend = "tensorrt"', "", "Object missing required field `backend`"),
        ('device_class = "orin"', 'device_class = "nano"', "device_class = 'nano': Invalid enum value"),
        ('id = "jetson-orin-nano-8gb"', 'id = "My Device"', "id = 'My Device': Expected `str` matching"),
        ("\ncpu = ", "\nmemo = 3\ncpu = ", "sources[...]: Expected `str`, got `int`"),
        ("sm = 87", "sm = 8.7", "gpu.sm = 8.7: Expected `int`, got `float`"),
        ("sm = 87", "sm = 87\nsm = 88", "is not TOML"),
        ("[gpu]", "[gpu", "is not TOML"),
        ("system_bytes", "system_byte", "memory: Object contains unknown field `system_byte`"),
        ("system_bytes = 1", "system_bytes = 90", "leaves nothing of memory.capacity_bytes = 8589934592: correct"),
        ("ptx_version = 92", 'ptx_version = "9.2"', "software[0].ptx_version = '9.2': Expected `int`, got `str`"),
        ("[[software]]", "[[jetpacks]]", "Object contains unknown field `jetpacks`"),
        ('builder = "tensorrt"', 'builder = "openvino"', "software[0].builder = 'openvino': Invalid enum value"),
        ('"tensorrt"\nbuilder', '"tensorrt_rtx"\nbuilder', "software[0].ahead_of_time_plugins = true, and tensorrt"),
        ('"int4"]', '"int4", "fp8"]', "precisions names 'fp8', which gpu.sm = 87 does not have: remove it, or correct"),
        ('"int4"]', '"int4", "fp4"]', "precisions names 'fp4', which gpu.sm = 87 does not have"),
        ('"int4"]', '"int2"]', "precisions[4] = 'int2': Invalid enum value"),
        ("[64, 196]", "[196, 64]", "buckets: image_tokens = [196, 64] must ascend"),
        ("[64, 196]", "[64, 64]", "buckets: image_tokens = [64, 64] must ascend"),
        ("[64, 196]", "[]", "buckets.image_tokens: Expected `array` of length >= 1"),
        ("[64, 196]", "[0]", "buckets.image_tokens[0] = 0: Expected `int` >= 1"),
        ("[64, 196]", "64", "buckets.image_tokens = 64: Expected `array`, got `int`"),
        ("[512, 2048]", "[512]", "prefill_tokens = 1024 is more than the largest of context_tokens, 512"),
        (BUCKETS, "", 'buckets is missing, and backend = "tensorrt" builds engines of fixed sizes'),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_and_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _edited(tmp_path, old, new)
    with pytest.raises(SonoEdgeError, match=re.escape(message)) as refused:
        load_profile(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("section", ["gpu", "software"])
def test_an_engine_needs_a_gpu_and_a_release(tmp_path: Path, section: str) -> None:
    path = _edited(tmp_path, 'backend = "onnxruntime"', 'backend = "tensorrt"', "cpu-aarch64")
    if section == "software":
        gpu = '[gpu]\nmodel = "any"\nsm = 87\ncuda_cores = 1\ntensor_cores = 1\n\n[memory]'
        path.write_text(path.read_text().replace("[memory]", gpu).replace("[sources]", '[sources]\ngpu = "nobody"'))
    with pytest.raises(SonoEdgeError, match=f'{section} is missing, and backend = "tensorrt"'):
        load_profile(path)


@pytest.mark.parametrize("value", ["unknown", 0.01, 1])
def test_efficiencies_are_shares(tmp_path: Path, value: float | str) -> None:
    line = next(re.finditer(r"^decode = .*$", (PACKAGED / "jetson-orin-nano-8gb.toml").read_text(), re.M))[0]
    assert load_profile(_edited(tmp_path, line, f"decode = {value!r}".replace("'", '"'))).efficiency.decode == value
    for wrong, reason in (("1.01", "<= 1.0"), ("0", "> 0.0"), ("-0.5", "> 0.0")):
        with pytest.raises(SonoEdgeError, match=rf"efficiency\.decode = {wrong}: Expected `float` {reason}"):
            load_profile(_edited(tmp_path, line, f"decode = {wrong}"))


@pytest.mark.parametrize("wrong", ["-1", "true", '"many"', "[]", "{}"])
def test_no_number_of_any_profile_can_be_something_else(tmp_path: Path, wrong: str) -> None:
    tried = 0
    path = tmp_path / "mine.toml"
    for name in IDS:
        text = (PACKAGED / f"{name}.toml").read_text()
        for line in re.finditer(r"^(\w+) = [\d_.]+(?=\s)", text, re.M):
            path.write_text(text[: line.start()] + f"{line[1]} = {wrong}" + text[line.end() :])
            with pytest.raises(SonoEdgeError, match=rf"mine\.toml: .*{line[1]}\b") as refused:
                load_profile(path)
            assert "\n" not in str(refused.value)
            tried += 1
    assert tried > 150


COUNTS = st.lists(st.integers(1, 4096), min_size=1, max_size=6)


@given(COUNTS, COUNTS)
def test_buckets_load_exactly_when_they_ascend_and_fit(prefill: list[int], context: list[int]) -> None:
    plain = {"image_tokens": [196], "prefill_tokens": prefill, "context_tokens": context}
    fine = all(sorted(set(counts)) == counts for counts in (prefill, context)) and prefill[-1] <= context[-1]
    if fine:
        assert msgspec.to_builtins(msgspec.convert(plain, Buckets)) == {k: tuple(v) for k, v in plain.items()}
        return
    with pytest.raises(msgspec.ValidationError, match=r"must ascend|more than the largest"):
        msgspec.convert(plain, Buckets)


def test_a_number_without_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r'mine\.toml: cpu\.cores = 6 names no source: add a line "cpu" = '):
        load_profile(_edited(tmp_path, "\ncpu = ", '\n"cpu.model" = '))
    with pytest.raises(SonoEdgeError, match=r"memory\.capacity_bytes = 8589934592 names no source"):
        load_profile(_edited(tmp_path, "\nmemory = ", '\n"memory.system_bytes" = '))
    with pytest.raises(SonoEdgeError, match=r"sources\.npu speaks of no number"):
        load_profile(_edited(tmp_path, "\ncpu = ", '\nnpu = "nobody"\ncpu = '))


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"none\.toml cannot be read \(No such file or directory\)"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(SonoEdgeError, match=r"cannot be read \(Is a directory\)"):
        load_profile(f"{tmp_path}/")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SonoEdgeError, match=r"bytes\.toml is not TOML"):
        load_profile(tmp_path / "bytes.toml")
