"""The JSON Schema of every message, made from the types; `python -m sonoedge.runtime.protocol_schema` prints it."""

import functools
from typing import Any

import msgspec

from sonoedge.runtime.protocol import VERSION, Broadcast, Reply, Request

_REF = "#/$defs/{name}"


@functools.cache
def message_schema() -> dict[str, Any]:
    """Return the schema: `$defs` has each message, and the unions Request, Reply and Broadcast.

    A message in msgpack is the same map as in JSON, but for bytes, which JSON has as base64.
    """
    unions = {"Request": Request, "Reply": Reply, "Broadcast": Broadcast}
    schemas, definitions = msgspec.json.schema_components(unions.values(), ref_template=_REF)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"sonoedge protocol, version {VERSION}",
        "anyOf": [{"$ref": _REF.format(name=name)} for name in unions],
        "$defs": {**dict(zip(unions, schemas, strict=True)), **definitions},
    }
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))  # lists where there were tuples
    return plain


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(message_schema()), indent=2).decode())
