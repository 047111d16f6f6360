"""The command line: refusals are one sentence with status 2, Ctrl-C is quiet, defects keep their traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sonoedge import __version__
from sonoedge.device_profiles import listing
from sonoedge.errors import SonoEdgeError

VERBS = (
    *("ask", "bench", "build", "demo", "distill", "doctor", "evaluate", "inspect"),
    *("make-checkpoint", "parity"),
    *("profiles", "serve", "verify", "view", "watch"),
)

Run = Callable[..., Any]  # the `sonoedge` fixture


def _python(code: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, **options)


def test_help_lists_the_verbs_that_exist(sonoedge: Run) -> None:
    ran = sonoedge("--help")
    assert ran.status == 0
    for verb in VERBS:
        assert f" {verb} " in ran.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_takes_json(sonoedge: Run, verb: str) -> None:
    ran = sonoedge(verb, "--help")
    assert ran.status == 0
    assert "--json" in ran.out


def test_the_version(sonoedge: Run) -> None:
    assert sonoedge("--version").out == f"sonoedge {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command (see `sonoedge --help`)"),
        (("vrify", "x"), "No such command 'vrify'"),
        (("verify",), "Missing argument 'BUNDLE' (see `sonoedge verify --help`)"),
        (("verify", "a", "b"), "Got unexpected extra argument"),
        (("verify", "a", "--colour"), "No such option: --colour"),
        (("distill", "a"), "Missing option '--data' (see `sonoedge distill --help`)"),
        (("evaluate", "a", "--frames", "many"), "Invalid value for '--frames'"),
        (("evaluate", "a", "--frames", "0"), "Invalid value for '--frames'"),
        (("ask", "tcp://127.0.0.1:1", "Which?", "--language", "fr"), "Invalid value for '--language'"),
        (("verify", "nowhere"), "nowhere is not a bundle, no such folder: make one with `sonoedge build`"),
    ],
)
def test_a_refusal_is_one_sentence(sonoedge: Run, arguments: tuple[str, ...], message: str) -> None:
    ran = sonoedge(*arguments)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.startswith("sonoedge: error: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_with_json_a_refusal_is_an_object_too(sonoedge: Run) -> None:
    ran = sonoedge("verify", "nowhere", "--json")
    assert ran.status == 2
    assert ran.err == f"sonoedge: error: {json.loads(ran.last_line)['error']}\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SonoEdgeError("cores = 0:\n choose more"), "cores = 0: choose more"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory: "),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), "a.json: Permission denied: check its"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory: name a folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free space"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: the disk is full: free space"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "whoever read the output has gone"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'sonoedge[export]'"),
        (ModuleNotFoundError("No module named 'onnx.x'", name="onnx.x"), "onnx is not installed: pip install"),
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "pip install 'sonoedge[cpu]'"),
    ],
)
def test_known_errors_become_a_sentence(
    sonoedge: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(listing, "run", _raising(error))
    ran = sonoedge("profiles")
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("x"),
        OSError(errno.EIO, "Input/output error"),
        ModuleNotFoundError("No x", name="x"),
        KeyError(1),
    ],
)
def test_a_defect_keeps_its_traceback(sonoedge: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(listing, "run", _raising(error))
    with pytest.raises(type(error)) as raised:
        sonoedge("profiles")
    assert raised.value is error


def test_a_verb_may_choose_its_status(sonoedge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sonoedge.export import parity

    monkeypatch.setattr(parity, "run", lambda checkpoint, vectors, as_json: 1)
    assert sonoedge("parity", "checkpoint", "vectors").status == 1


def test_a_missing_library_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from sonoedge.cli import main; sys.exit(main(['parity', 'a', 'b']))"
    )
    process = _python(code)
    assert process.communicate()[1] == "sonoedge: error: torch is not installed: pip install 'sonoedge[export]'\n"
    assert process.returncode == 2


def test_ctrl_c_is_quiet() -> None:
    code = """
import sys, time
from sonoedge.cli import main
from sonoedge.device_profiles import listing

def run(*, as_json):
    print("running", flush=True)
    time.sleep(60)

listing.run = run
sys.exit(main(["profiles"]))
"""
    process = _python(code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130


@pytest.mark.parametrize("arguments", [["profiles"], ["profiles", "--json"], ["verify", "nowhere", "--json"]])
def test_a_reader_that_went_away_is_one_sentence(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    process = _python(f"import sys; from sonoedge.cli import main; sys.exit(main({arguments!r}))", stdout=writing)
    os.close(reading)
    os.close(writing)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert told.startswith("sonoedge: error: ")
    assert told.count("\n") == 1


def test_profiles_as_a_table_and_as_json(sonoedge: Run) -> None:
    table = sonoedge("profiles").out
    found = json.loads(sonoedge("profiles", "--json").last_line)["profiles"]
    assert [profile["id"] for profile in found] == [line.split()[0] for line in table.splitlines() if "-" in line[:7]]


def test_doctor_says_what_each_line_means(sonoedge: Run) -> None:
    told = sonoedge("doctor").out
    findings = json.loads(sonoedge("doctor", "--json").last_line)["findings"]
    assert {"Python", "Processor", "Memory", "ONNX Runtime", "OpenCV", "TensorRT"} <= {
        item["name"] for item in findings
    }
    for item in findings:
        assert item["name"] in told
        assert item["meaning"].endswith(".")


def test_verify_checks_the_hashes_before_anything_runs(sonoedge: Run, small_bundle: Path) -> None:
    (small_bundle / "graphs" / "vision.onnx").write_bytes(b"Vision")
    ran = sonoedge("verify", small_bundle, "--json")
    assert ran.status == 2
    assert "graphs/vision.onnx has changed" in json.loads(ran.last_line)["error"]


def _raising(error: Exception) -> Callable[..., None]:
    def run(*, as_json: bool) -> None:
        raise error

    return run
