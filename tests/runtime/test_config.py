"""The configuration of `serve`: read, overridden, printed so that it reads the same again, refused in one sentence."""

from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import serve
from sonoedge.runtime.config import Config, print_config, read_config


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def test_without_a_file_the_options_are_all(tmp_path: Path) -> None:
    assert read_config(None, {"source": "0", "fps": None}) == Config(source="0")


def test_the_command_line_wins_and_what_it_leaves_open_stays(tmp_path: Path) -> None:
    path = write(tmp_path, 'bundle = "a"\nsource = "clip.mp4"\nfps = 25\nonce = true\n')
    config = read_config(path, {"bundle": "b", "source": None, "once": False, "fps": None})
    assert (config.bundle, config.source, config.once, config.fps) == ("b", "clip.mp4", False, 25.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsp = 30", "unknown field `fsp`"),
        ("fps = 0", "at `$.fps`"),
        ('fps = "fast"', "at `$.fps`"),
        ('log_level = "chatty"', "at `$.log_level`"),
        ("speed = 0", "at `$.speed`"),
        ("speed = 1000", "at `$.speed`"),
        ('step = "yes"', "at `$.step`"),
        ('backend = "abacus"', "at `$.backend`"),
        ("once = 1", "at `$.once`"),
        ("fps = ", "is not TOML"),
        ("[audit]\nx = 1", "at `$.audit`"),
        ("audit_max_bytes = 1", "at `$.audit_max_bytes`"),
    ],
)
def test_a_mistake_is_told_with_file_key_and_way_out(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SonoEdgeError, match="--print-config") as caught:
        read_config(path, {})
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"none.toml: No such file.*--config"):
        read_config(tmp_path / "none.toml", {})


def test_bytes_that_are_no_text_are_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(b'source = "\xff"')
    with pytest.raises(SonoEdgeError, match="is not TOML"):
        read_config(path, {})


def test_what_is_printed_reads_the_same_again_with_every_key(tmp_path: Path) -> None:
    for config in (Config(), Config(bundle="/b", source='rtsp://a/"b"\\c', once=True, fps=29.97, log_level="debug")):
        printed = print_config(config)
        assert read_config(write(tmp_path, printed), {}) == config
        for name in Config.__struct_fields__:
            assert name in printed


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives_printing(text: str) -> None:
    assert msgspec.toml.decode(print_config(Config(source=text)))["source"] == text


def test_serve_prints_the_effective_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'source = "0"\nlog_level = "info"\n')
    serve.run(Path("b"), None, None, None, None, None, False, config=path, print_only=True)
    assert read_config(write(tmp_path, capsys.readouterr().out), {}) == Config("b", "0", log_level="info")


@pytest.mark.parametrize(("bundle", "source", "missing"), [(None, "0", "BUNDLE"), (Path("b"), None, "--source")])
def test_serve_says_what_is_missing(bundle: Path | None, source: str | None, missing: str) -> None:
    with pytest.raises(SonoEdgeError, match=missing):
        serve.run(bundle, source, None, None, None, None, False)
