"""Messages become values field by field."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any

import pytest
from aptserve import _wire, types
from aptserve.v1 import admin_pb2, inference_pb2, worker_pb2
from google.protobuf import duration_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message


def fill(message: Any, counter: list[int]) -> Any:
    """Set every field to another value, one entry in each repeated field."""
    for field in message.DESCRIPTOR.fields:
        counter[0] += 1
        value = getattr(message, field.name)
        if field.message_type is not None:
            fill(value.add() if field.is_repeated else value, counter)
        elif field.is_repeated:
            value.append(_scalar(field, counter[0]))
        else:
            setattr(message, field.name, _scalar(field, counter[0]))
    return message


def _scalar(field: FieldDescriptor, number: int) -> Any:
    if field.enum_type is not None:
        return 1
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return f"text {number}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    return number


def leaves(value: Any) -> list[Any]:
    """Every scalar in a value of the SDK, in no order."""
    if dataclasses.is_dataclass(value):
        return [leaf for f in dataclasses.fields(value) for leaf in leaves(getattr(value, f.name))]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def proto_leaves(message: Message) -> list[Any]:
    result: list[Any] = []
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if isinstance(item, duration_pb2.Duration):
                result.append(_wire.to_seconds(item))
            elif isinstance(item, Message):
                result.extend(proto_leaves(item))
            elif field.enum_type is not None:
                result.append(field.enum_type.values_by_number[item].name)
            else:
                result.append(item)
    return result


def comparable(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


CASES: list[tuple[type[Message], typing.Callable[[Any], Any]]] = [
    (admin_pb2.GetStatusResponse, _wire.status_from_proto),
    (admin_pb2.WatchPlansResponse, _wire.plan_from_proto),
    (inference_pb2.GetModelResponse, _wire.model_from_proto),
    (inference_pb2.CountTokensResponse, _wire.token_count_from_proto),
    (inference_pb2.Timing, _wire.timing_from_proto),
    (inference_pb2.Usage, _wire.usage_from_proto),
    (inference_pb2.TokenChunk, _wire.chunk_from_proto),
]


@pytest.mark.parametrize(("kind", "convert"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_no_field_is_lost(kind: type[Message], convert: Any) -> None:
    message = fill(kind(), [0])
    expected = [
        value.removeprefix("CACHE_TIER_") if isinstance(value, str) else value
        for value in proto_leaves(message)
    ]
    actual = [comparable(leaf) for leaf in leaves(convert(message))]
    assert sorted(map(str, actual)) == sorted(map(str, expected))


@pytest.mark.parametrize(
    ("descriptor", "value"),
    [
        (admin_pb2.GetStatusResponse.DESCRIPTOR, types.Status),
        (admin_pb2.WorkerStatus.DESCRIPTOR, types.WorkerStatus),
        (admin_pb2.TierStatus.DESCRIPTOR, types.TierStatus),
        (worker_pb2.Calibration.DESCRIPTOR, types.Calibration),
        (worker_pb2.TierSeconds.DESCRIPTOR, types.TierSeconds),
        (admin_pb2.Totals.DESCRIPTOR, types.Totals),
        (admin_pb2.PlannedRequest.DESCRIPTOR, types.PlannedRequest),
        (inference_pb2.Usage.DESCRIPTOR, types.Usage),
        (inference_pb2.Timing.DESCRIPTOR, types.Timing),
        (inference_pb2.TokenChunk.DESCRIPTOR, types.Chunk),
        (inference_pb2.CountTokensResponse.DESCRIPTOR, types.TokenCount),
    ],
    ids=lambda case: case.name if isinstance(case, Descriptor) else "",
)
def test_names_are_those_of_the_protocol(descriptor: Descriptor, value: Any) -> None:
    names = {f.name.removesuffix("_seconds") for f in dataclasses.fields(value)}
    assert names == {field.name.removesuffix("_seconds") for field in descriptor.fields}


def test_values_are_frozen() -> None:
    for name, value in vars(types).items():
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, name  # type: ignore[attr-defined]


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.1, 1.5, 86400.000000001])
def test_durations_keep_nanoseconds(seconds: float) -> None:
    assert _wire.to_seconds(_wire.to_duration(seconds)) == pytest.approx(seconds, abs=5e-10)
