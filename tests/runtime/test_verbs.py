"""The verbs serve, ask and watch, in processes of their own where signals matter."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

ServeProcess = Callable[..., Any]
Sonoedge = Callable[..., Any]


def lines(text: str) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in text.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(serve_process: ServeProcess, clip: Path, number: signal.Signals) -> None:
    process = serve_process(clip)
    assert process.ready["ready"] is True
    time.sleep(0.3)
    process.popen.send_signal(number)
    out, err = process.popen.communicate(timeout=60)
    assert (process.popen.returncode, err) == (0, "")
    assert lines(out)[-1]["frames"] > 0


def test_a_session_with_the_three_verbs(serve_process: ServeProcess, sonoedge: Sonoedge, clip: Path) -> None:
    process = serve_process(clip)
    bind, hints_bind = process.ready["bind"], process.ready["hints_bind"]
    assert bind.startswith("tcp://127.0.0.1:")
    assert not bind.endswith("*")
    watched = sonoedge("watch", hints_bind, "--count", 7, "--timeout-s", 60, "--json")
    assert watched.status == 0
    hints = lines(watched.out)
    assert len(hints) == 7
    assert {"hint", "answer", "text", "probability", "abstain", "reason", "frame", "age_ms", "model"} <= set(hints[0])
    plain = sonoedge("watch", hints_bind, "--count", 2, "--timeout-s", 60)
    assert len(plain.out.splitlines()) == 2
    assert plain.out.startswith("frame ")

    asked = sonoedge("ask", bind, "Which region is shown?", "--json")
    assert asked.status == 0
    answer = msgspec.json.decode(asked.last_line)
    assert answer["answer"] in ("breast", "gynaecology")  # the clip is dark
    assert {"frame", "age_ms", "model", "intended_use", "tokens", "ms"} <= set(answer)
    spoken = sonoedge("ask", bind, "图像质量如何？")
    assert (spoken.status, spoken.out) == (0, "良好\n")
    assert "Tests only." in spoken.err

    second = sonoedge("ask", bind, "why? " * 3000)
    assert second.status == 2
    assert "context holds 4096" in second.err or "tokens long" in second.err


def test_a_frame_is_frozen_asked_about_reported_on_and_released(
    serve_process: ServeProcess, sonoedge: Sonoedge, clip: Path
) -> None:
    bind = serve_process(clip).ready["bind"]
    while "no frame yet" in (frozen := sonoedge("freeze", bind, "before", "--json")).out:
        time.sleep(0.05)
    kept = msgspec.json.decode(frozen.last_line)
    assert (kept["type"], kept["name"], kept["released"]) == ("frozen", "before", False)
    chosen = sonoedge(
        "ask",
        bind,
        "Which?",
        "--choice",
        "liver",
        "--choice",
        "kidney",
        "--frame",
        "before",
        "--frame",
        "live",
        "--json",
    )
    answer = msgspec.json.decode(chosen.last_line)
    assert answer["frame"] == kept["frame"]
    assert [frame["name"] for frame in answer["frames"]] == ["before", "live"]
    assert answer["candidates"].keys() == {"liver", "kidney"}
    report = sonoedge("report", bind, "--language", "zh", "--frame", "before")
    assert report.status == 0
    assert f"frame {kept['frame']}," in report.err
    assert "ask about it" in sonoedge("freeze", bind, "again").out
    assert sonoedge("freeze", bind, "before", "--release").out.startswith("released before: frame ")
    gone = sonoedge("ask", bind, "Which?", "--frame", "before")
    assert (gone.status, gone.out) == (2, "")
    assert "there is no frozen frame 'before': name 'live', or one of 'again'" in gone.err
    assert "give its NAME" in sonoedge("freeze", bind, "--release").err


def test_frames_are_kept_beside_a_log_only(sonoedge: Sonoedge, tmp_path: Path, clip: Path) -> None:
    ran = sonoedge("serve", tmp_path, "--source", clip, "--keep-frames", tmp_path / "frames")
    assert ran.status == 2
    assert "give --audit too" in ran.err


def test_a_second_server_exits_with_the_endpoint(serve_process: ServeProcess, clip: Path) -> None:
    first = serve_process(clip)
    second = serve_process(clip, "--bind", first.ready["bind"])
    _, err = second.popen.communicate(timeout=60)
    assert second.popen.returncode == 2
    assert second.ready == {"error": second.ready["error"]}
    assert f"{first.ready['bind']} is in use" in err


def test_once_ends_by_itself(serve_process: ServeProcess, write_video: Callable[..., Path]) -> None:
    process = serve_process(write_video(frames=6, fps=30), "--once")
    out, _ = process.popen.communicate(timeout=60)
    assert process.popen.returncode == 0
    summary = lines(out)[-1]
    assert summary["frames"] == 6
    assert summary["hinted"] + summary["dropped"] == 6


@pytest.mark.parametrize("verb", [("ask", "Anyone?"), ("watch",)])
def test_no_server_is_told_in_one_sentence(sonoedge: Sonoedge, verb: tuple[str, ...]) -> None:
    name, *rest = verb
    ran = sonoedge(name, "tcp://127.0.0.1:1", *rest, "--timeout-s", 0.2)
    assert ran.status == 2
    assert "was silent for 0.2 s: start `sonoedge serve`" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "none.mp4"], "none.mp4 does not exist"),
        (["--source", "CLIP", "--bind", "tcp://0.0.0.0:5555"], "CURVE"),
        (["--source", "CLIP"], "is not a bundle"),
    ],
)
def test_serve_refuses_in_one_sentence(
    sonoedge: Sonoedge, tmp_path: Path, clip: Path, options: list[str], message: str
) -> None:
    ran = sonoedge("serve", tmp_path / "none", *[str(clip) if word == "CLIP" else word for word in options])
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_watch_ends_quietly_on_interrupt(serve_process: ServeProcess, clip: Path) -> None:
    process = serve_process(clip)

    command = [
        sys.executable,
        "-c",
        "import sys; from sonoedge.cli import main; sys.exit(main())",
        "watch",
        process.ready["hints_bind"],
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert msgspec.json.decode(watching.stdout.readline())["type"] == "hint"
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, "")


def test_the_runtime_loads_no_training_library() -> None:
    code = (
        "import sys; import sonoedge.runtime.serve, sonoedge.runtime.ask, sonoedge.runtime.watch;"
        "import sonoedge.runtime.sources.dicom, sonoedge.runtime.sources.video, sonoedge.runtime.sources.live;"
        "bad = {'torch', 'transformers', 'onnx', 'safetensors'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
