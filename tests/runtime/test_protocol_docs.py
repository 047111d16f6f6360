"""docs/protocol.md and docs/protocol.schema.json say what the code does, byte for byte."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from sonoedge.runtime.protocol import (
    VERSION,
    Broadcast,
    Reply,
    Request,
    decode_broadcast,
    decode_reply,
    decode_request,
    encode,
)
from sonoedge.runtime.protocol_schema import message_schema

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "protocol.md").read_text()
CHAPTERS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
EXAMPLES = [
    (chapter, words, bytes.fromhex(hexadecimal))
    for chapter, body in CHAPTERS.items()
    for words, hexadecimal in re.findall(r"```json\n(.*?)\n```\n```hex\n(.*?)\n```", body, re.DOTALL)
]
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "Requests": decode_request,
    "Replies": decode_reply,
    "Broadcasts": decode_broadcast,
}


def test_the_schema_file_is_current() -> None:
    assert msgspec.json.decode((DOCS / "protocol.schema.json").read_bytes()) == message_schema(), (
        "run python -m sonoedge.runtime.protocol_schema > docs/protocol.schema.json"
    )


@pytest.mark.parametrize(("chapter", "words", "payload"), EXAMPLES, ids=[words[:40] for _, words, _ in EXAMPLES])
def test_the_examples_are_messages(chapter: str, words: str, payload: bytes) -> None:
    message = DECODERS[chapter](payload)
    assert message.v == VERSION
    said, shown = msgspec.json.decode(words), msgspec.msgpack.decode(payload)
    assert list(shown) == list(said)
    assert msgspec.json.decode(msgspec.json.encode(shown)) == said
    understood = msgspec.json.decode(msgspec.json.encode(message))
    assert {name: understood[name] for name in said} == said
    if chapter != "Requests":  # the server writes every field, in this order
        assert encode(message) == payload


def test_every_message_has_an_example() -> None:
    for chapter, union in (("Requests", Request), ("Replies", Reply), ("Broadcasts", Broadcast)):
        shown = {msgspec.json.decode(words)["type"] for where, words, _ in EXAMPLES if where == chapter}
        tags = {member.__struct_config__.tag for member in get_args(union)}
        if chapter == "Replies":
            tags -= {"status", "schema"}  # as long as their parts, which the schema has
        assert shown == tags


def test_limits_stand_in_the_schema_and_in_the_text() -> None:
    ask = message_schema()["$defs"]["Ask"]
    assert ask["additionalProperties"] is False
    assert ask["required"] == ["type", "id", "question"]
    for field, row in (("frames", "pictures of one question"), ("turns", "earlier turns"), ("choices", "choices")):
        limit = ask["properties"][field]["maxItems"]
        assert re.search(rf"^\| {row} \| (2 to )?{limit}\b", TEXT, re.MULTILINE), row
