"""Profiles are checked when they are loaded: every key known, every number with its source."""

import re
from pathlib import Path

import pytest

from sonoedge.device_profiles import list_profiles, load_profile
from sonoedge.errors import SonoEdgeError

IDS = ["cpu-aarch64", "cpu-x86-64", "jetson-agx-orin-64gb", "jetson-orin-nano-8gb"]
PACKAGED = Path(load_profile.__code__.co_filename).parent


def test_every_packaged_profile_loads_under_its_own_name() -> None:
    assert [profile.id for profile in list_profiles()] == IDS
    for name in IDS:
        assert load_profile(name).id == name
        assert load_profile(PACKAGED / f"{name}.toml") == load_profile(name)


def test_jetson_numbers_agree_with_each_other() -> None:
    """Dense INT8 is 1024 operations a tensor core a clock, twice FP16: a typing mistake would show."""
    for name, clock_ghz in (("jetson-orin-nano-8gb", 1.02), ("jetson-agx-orin-64gb", 1.3)):
        profile = load_profile(name)
        fastest = profile.modes[0]
        assert profile.gpu is not None
        assert fastest.int8_dense_tops == pytest.approx(profile.gpu.tensor_cores * 1024 * clock_ghz / 1e3, rel=0.02)
        for mode in profile.modes:
            assert mode.int8_dense_tops != "unknown"
            assert mode.fp16_dense_tflops == pytest.approx(mode.int8_dense_tops / 2, rel=0.05)


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(SonoEdgeError, match=rf"unknown profile 'jetson-nano': choose {', '.join(IDS)}, or name a TOML"):
        load_profile("jetson-nano")


def _edited(tmp_path: Path, old: str, new: str) -> Path:
    text = (PACKAGED / "jetson-orin-nano-8gb.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_a_file_of_the_users_own_works_the_same_way(tmp_path: Path) -> None:
    path = _edited(tmp_path, 'id = "jetson-orin-nano-8gb"', 'id = "mine"')
    assert load_profile(str(path)).id == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 6", "cores = -6", "cpu.cores = -6: Expected `int` >= 1"),
        ("cores = 6", 'cores = "six"', "cpu.cores = 'six': "),
        ("watts = 25", "watt = 25", "modes[1]: Object contains unknown field `watt`"),
        ("bandwidth_gb_s = 102.4", "bandwidth_gb_s = true", "modes[0].bandwidth_gb_s = True: Expected"),
        ('backend = "tensorrt"', 'backend = "tensorflow"', "backend = 'tensorflow': Invalid enum value"),
        ('backend = "tensorrt"', "", "Object missing required field `backend`"),
        ('id = "jetson-orin-nano-8gb"', 'id = "My Device"', "id = 'My Device': Expected `str` matching"),
        ("\ncpu = ", "\nmemo = 3\ncpu = ", "sources[...]: Expected `str`, got `int`"),
        ("sm = 87", "sm = 87\nsm = 88", "is not TOML"),
        ("[gpu]", "[gpu", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_and_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _edited(tmp_path, old, new)
    with pytest.raises(SonoEdgeError, match=re.escape(message)) as refused:
        load_profile(path)
    assert str(path) in str(refused.value)


def test_a_number_without_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r'mine\.toml: cpu\.cores = 6 names no source: add a line "cpu" = '):
        load_profile(_edited(tmp_path, "\ncpu = ", '\n"cpu.model" = '))
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
