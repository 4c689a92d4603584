"""Which field of a message that does not parse is at fault.

protobuf only says that some string is not UTF-8. A client deserves the field, so the wire format
is walked with the message's descriptor; only string fields are looked at.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _WireFormatError(Exception):
    """The bytes are no protobuf message at all."""


def find_invalid_string(data: bytes, descriptor: Descriptor) -> str | None:
    """Path of the first string field that is not UTF-8, such as ``sampling.stop_strings``.

    ``None``: the message is broken in another way.
    """
    try:
        return _find(memoryview(data), descriptor)
    except _WireFormatError:
        return None


def _find(data: memoryview, descriptor: Descriptor) -> str | None:
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        field = descriptor.fields_by_number.get(tag >> 3)
        value, position = _read_value(data, position, tag & 7)
        if field is None or value is None:
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
            return str(field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            inner = _find(value, field.message_type)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None


def _read_value(data: memoryview, position: int, wire_type: int) -> tuple[memoryview | None, int]:
    """The bytes of a length-delimited value, else ``None``; and where the next tag starts."""
    if wire_type == _VARINT:
        return None, _read_varint(data, position)[1]
    if wire_type == _FIXED64:
        return None, position + 8
    if wire_type == _FIXED32:
        return None, position + 4
    if wire_type != _BYTES:
        raise _WireFormatError
    length, start = _read_varint(data, position)
    end = start + length
    if end > len(data):
        raise _WireFormatError
    return data[start:end], end


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _WireFormatError


def _is_utf8(value: memoryview) -> bool:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError:
        return False
    return True
