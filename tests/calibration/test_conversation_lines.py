"""JSON Lines give the cases that a JSON list gives, and name the line that is wrong."""

from pathlib import Path

import msgspec
import pytest

from sonoedge.calibration.conversation_lines import ConversationLines
from sonoedge.calibration.conversations import read_conversations, write_phantom_conversations
from sonoedge.errors import SonoEdgeError


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Four cases as a list."""
    return write_phantom_conversations(tmp_path / "written", [5, 6], ["en", "zh"], size=96)


@pytest.fixture
def lines(listed: Path) -> Path:
    """The same cases as lines, one of them empty."""
    path = listed.with_suffix(".jsonl")
    cases = [msgspec.json.encode(case) for case in msgspec.json.decode(listed.read_bytes())]
    path.write_bytes(b"\n\n".join(cases))
    return path


def test_lines_are_the_list(listed: Path, lines: Path) -> None:
    found, wanted = ConversationLines(lines), read_conversations(listed)
    assert len(found) == len(wanted) == 4
    assert tuple(found) == wanted
    assert found[3] == wanted[3]
    assert found[1:3] == list(wanted[1:3])


def test_what_is_wrong_is_named_with_its_line(lines: Path) -> None:
    whole = lines.read_text()
    lines.write_text(whole + "\n{}")
    with pytest.raises(SonoEdgeError, match=r"conversations.jsonl line 8 is malformed: .*; correct it"):
        ConversationLines(lines)
    lines.write_text(whole.replace("images/phantom_00000006.png", "images/gone.png"))
    with pytest.raises(SonoEdgeError, match=r"name images that do not exist: .*images/gone.png; add or remove"):
        ConversationLines(lines)
    lines.write_text("\n")
    with pytest.raises(SonoEdgeError, match="hold no entry"):
        ConversationLines(lines)
    with pytest.raises(SonoEdgeError, match=r"nowhere.jsonl cannot be read"):
        ConversationLines(lines.with_name("nowhere.jsonl"))
