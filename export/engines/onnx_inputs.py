"""Gives inputs of an ONNX file fixed shapes before it is parsed, without the onnx package, which a device lacks.

TensorRT must know how many tokens a cache holds when it reads the operator that writes it, before any optimization
profile; how many those are depends on the profile's buckets. Source of the field numbers: onnx.proto; of the encoding:
Protocol Buffers, "Encoding".
"""

from collections.abc import Callable, Iterator, Mapping

from sonoedge.errors import SonoEdgeError

_GRAPH, _INPUT = 7, 11  # of ModelProto, of GraphProto
_NAME, _TYPE = 1, 2  # of ValueInfoProto
_TENSOR_TYPE, _SHAPE = 1, 2  # of TypeProto, of TypeProto.Tensor
_DIM, _DIM_VALUE = 1, 1  # of TensorShapeProto, of TensorShapeProto.Dimension

_BYTES = 2  # wire type of a message or a text
_FIXED = {1: 8, 5: 4}  # wire type of a number → bytes


def fix_inputs(model: bytes, shapes: Mapping[str, tuple[int, ...]], name: str) -> bytes:
    """Return the model with the shapes of the named inputs replaced; raises SonoEdgeError when it is no ONNX file."""

    def value(info: bytes) -> bytes:
        own = next((bytes(content) for number, _, content, _ in _fields(info) if number == _NAME), b"").decode()
        if own not in shapes:
            return info
        dims = b"".join(_field(_DIM, bytes([_DIM_VALUE << 3]) + _varint(size)) for size in shapes[own])
        return _inside(info, (_TYPE, _TENSOR_TYPE, _SHAPE), lambda _: dims)

    try:
        return _inside(model, (_GRAPH, _INPUT), value)
    except (IndexError, ValueError) as error:
        raise SonoEdgeError(f"{name} is no ONNX file ({error}): build the bundle again") from error


def _inside(message: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The message with every message at the end of `path`, field in field, changed."""
    parts: list[bytes] = []
    for number, wire, content, whole in _fields(message):
        if number != path[0] or wire != _BYTES:
            parts.append(whole)
        else:
            parts.append(_field(number, _inside(content, path[1:], change) if path[1:] else change(content)))
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Number, wire type, content and whole encoding of every field."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == _BYTES:
            size, at = _read_varint(message, at)
            end = at + size
        elif wire in _FIXED:
            end = at + _FIXED[wire]
        elif wire == 0:
            _, end = _read_varint(message, at)
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if end > len(message):
            raise ValueError(f"it ends inside the field at byte {start}")
        yield key >> 3, wire, message[at:end], message[start:end]
        at = end


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
