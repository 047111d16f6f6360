"""The log: one line a record on standard error, from a level up, with the journal's severities where it is read."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sonoedge.runtime.client import Client
from sonoedge.runtime.logs import log_to_stderr


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    parent = logging.getLogger("sonoedge")
    yield logging.getLogger("sonoedge.test")
    parent.handlers.clear()
    parent.setLevel(logging.NOTSET)
    parent.propagate = True


def test_one_line_a_record_tracebacks_too(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("info")
    logger.info("first\nsecond")
    try:
        raise ValueError("third")
    except ValueError:
        logger.exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\S+ \S+ INFO first \| second", lines[0])
    assert "failed | Traceback" in lines[1]
    assert lines[1].endswith("ValueError: third")


def test_what_is_below_the_level_is_not_said(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("info")
    log_to_stderr("error")  # in its place
    logger.warning("quiet")
    logger.error("loud")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_journal_gets_severities_and_no_clock() -> None:
    code = (
        "import logging, os; status = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}';"
        "from sonoedge.runtime.logs import log_to_stderr; log_to_stderr('debug');"
        "[logging.getLogger('sonoedge.x').log(level, 'text') for level in (10, 20, 30, 40)]"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["<7>text", "<6>text", "<4>text", "<3>text"]


SERVE = """
import runpy, sys
from pathlib import Path
from unittest import mock
from sonoedge.runtime import serve

_, _tokenizer, source, config = sys.argv
load = runpy.run_path(FAKE)["load"]
with mock.patch("sonoedge.runtime.serve.open_model", load):
    serve.run(Path("bundle"), source, None, None, None, None, True, config=Path(config))
"""


def test_neither_questions_nor_file_names_are_logged(tokenizer_file: Path, clip: Path, tmp_path: Path) -> None:
    named, config = tmp_path / "Doe^Jane.dcm", tmp_path / "serve.toml"
    named.write_bytes(clip.read_bytes())
    config.write_text('log_level = "debug"\nbind = "tcp://127.0.0.1:*"\nhints_bind = "tcp://127.0.0.1:*"\n')
    fake = str(Path(__file__).with_name("serve_fake.py"))
    command = [sys.executable, "-c", SERVE.replace("FAKE", repr(fake)), str(tokenizer_file), str(named), str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        with Client(ready["bind"], timeout_s=30) as client:
            client.answer("What has Mrs Doe?")
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "source live" in err
    assert "Doe" not in err
