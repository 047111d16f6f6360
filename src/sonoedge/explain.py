"""What msgspec says of a wrong file, worded with the key and the value that stands there."""

import re


def explain(message: str, raw: object) -> str:
    """Word msgspec's "… - at `$.key`" with the value found in `raw`, the file as plain data."""
    reason, _, place = message.partition(" - at `$")
    place = place.rstrip("`")
    value = raw
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", place):
        match value:
            case dict():
                value = value.get(name)
            case list() if index and int(index) < len(value):
                value = value[int(index)]
    key = place.lstrip(".")
    if not key or isinstance(value, dict | list):
        return f"{key}: {reason}" if key else reason
    return f"{key} = {value!r}: {reason}"
