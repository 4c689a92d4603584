"""Which field of a message is not UTF-8."""

from __future__ import annotations

from typing import cast

import pytest
from aptserve.v1 import inference_pb2, types_pb2, worker_pb2
from aptserve_scheduler.api.malformed import find_invalid_string
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

MARK = "@@@@"


def descriptor_of(message: Message) -> Descriptor:
    return cast(Descriptor, message.DESCRIPTOR)


def broken(message: Message) -> bytes:
    """The message with every ``@@@@`` replaced by bytes that are not UTF-8."""
    return message.SerializeToString().replace(MARK.encode(), b"ab\xff\xfe")


CASES = [
    (inference_pb2.GenerateRequest(text=MARK), "text"),
    (inference_pb2.GenerateRequest(request_id=MARK, text="fine"), "request_id"),
    (
        inference_pb2.GenerateRequest(
            text="fine",
            sampling=types_pb2.SamplingParams(
                top_p=0.5,
                seed=2**63,
                logit_bias=[types_pb2.LogitBias(token_id=1, bias=2.0)],
                stop_strings=["fine", MARK],
            ),
        ),
        "sampling.stop_strings",
    ),
    (inference_pb2.AbortRequest(request_ids=["a", "b", MARK]), "request_ids"),
    (
        worker_pb2.AttachRequest(
            register=worker_pb2.Register(
                worker_id="fine",
                model=worker_pb2.ModelInfo(name=MARK),
                calibration=worker_pb2.Calibration(base_seconds=1.0),
            )
        ),
        "register.model.name",
    ),
]


@pytest.mark.parametrize(("message", "path"), CASES, ids=[path for _, path in CASES])
def test_the_field_is_named_by_its_path(message: Message, path: str) -> None:
    assert find_invalid_string(broken(message), descriptor_of(message)) == path


def test_bytes_fields_may_hold_anything() -> None:
    message = worker_pb2.ModelInfo(name="fine", tokenizer_json=b"\xff\xfe")
    assert find_invalid_string(message.SerializeToString(), message.DESCRIPTOR) is None


@pytest.mark.parametrize("data", [b"\x1a\xff", b"\x1a\x7fab", b"\xff" * 12, b"\x0b", b"\x09\x01"])
def test_what_is_no_message_names_no_field(data: bytes) -> None:
    assert find_invalid_string(data, inference_pb2.GenerateRequest.DESCRIPTOR) is None


@given(st.binary(max_size=60))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    find_invalid_string(data, inference_pb2.GenerateRequest.DESCRIPTOR)
