"""Bad input gets a fitting code that names the field, and disturbs nobody."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from aptserve.errors import (
    AlreadyExistsError,
    AptServeError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    from_rpc_error,
)
from aptserve.v1 import admin_pb2, inference_pb2
from aptserve.v1.types_pb2 import LogitBias, SamplingParams, TokenIds
from aptserve_worker.fake import FakeModel, FakeWorker
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs
from support.scheduling import CALL_SECONDS, Serving, collect, read_event, serving


async def failure(call: Any) -> AptServeError:
    """The error that a call ends with."""

    async def finish() -> None:
        if not hasattr(call, "__aiter__"):
            await call
            return
        async for _ in call:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return from_rpc_error(caught.value)


async def wrong_field(call: Any) -> str:
    error = await failure(call)
    assert isinstance(error, InvalidArgumentError), error
    return error.field


NAN = math.nan
BAD_SAMPLING: list[tuple[str, SamplingParams]] = [
    ("sampling.max_tokens", SamplingParams(max_tokens=0)),
    ("sampling.max_tokens", SamplingParams(max_tokens=2**32 - 1)),
    ("sampling.min_tokens", SamplingParams(max_tokens=4, min_tokens=5)),
    ("sampling.min_tokens", SamplingParams(min_tokens=257)),
    ("sampling.temperature", SamplingParams(temperature=-0.1)),
    ("sampling.temperature", SamplingParams(temperature=NAN)),
    ("sampling.temperature", SamplingParams(temperature=math.inf)),
    ("sampling.top_p", SamplingParams(top_p=0.0)),
    ("sampling.top_p", SamplingParams(top_p=1.5)),
    ("sampling.top_p", SamplingParams(top_p=NAN)),
    ("sampling.min_p", SamplingParams(min_p=-0.1)),
    ("sampling.repetition_penalty", SamplingParams(repetition_penalty=0.0)),
    ("sampling.presence_penalty", SamplingParams(presence_penalty=-11)),
    ("sampling.frequency_penalty", SamplingParams(frequency_penalty=NAN)),
    ("sampling.logprobs", SamplingParams(logprobs=21)),
    ("sampling.logit_bias.token_id", SamplingParams(logit_bias=[LogitBias(token_id=257)])),
    ("sampling.logit_bias.bias", SamplingParams(logit_bias=[LogitBias(bias=NAN)])),
    ("sampling.logit_bias.token_id", SamplingParams(logit_bias=[LogitBias(), LogitBias()])),
    ("sampling.stop_token_ids", SamplingParams(stop_token_ids=[257])),
    ("sampling.stop_token_ids", SamplingParams(stop_token_ids=[1] * 65)),
    ("sampling.logit_bias", SamplingParams(logit_bias=[LogitBias()] * 1025)),
    ("sampling.stop_strings", SamplingParams(stop_strings=[""])),
    ("sampling.stop_strings", SamplingParams(stop_strings=["x" * 257])),
    ("sampling.stop_strings", SamplingParams(stop_strings=["x"] * 17)),
]


@pytest.mark.parametrize(("field", "sampling"), BAD_SAMPLING)
async def test_sampling(
    served: Serving, worker: FakeWorker, field: str, sampling: SamplingParams
) -> None:
    assert await wrong_field(served.generate(sampling=sampling)) == field


BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"text": None}),
    ("text", {"text": ""}),
    ("text", {"text": "x" * 2049}),
    ("text", {"text": "x" * (10 << 20)}),
    ("request", {"text": "x" * (17 << 20)}),
    ("token_ids.ids", {"token_ids": TokenIds()}),
    ("token_ids.ids", {"token_ids": TokenIds(ids=[1, 257])}),
    ("token_ids.ids", {"token_ids": TokenIds(ids=[2**32 - 1])}),
    ("token_ids.ids", {"token_ids": TokenIds(ids=[1] * 2049)}),
    ("sampling.max_tokens", {"text": "x" * 2000, "sampling": SamplingParams(max_tokens=50)}),
    ("sampling.min_tokens", {"text": "x" * 2048, "sampling": SamplingParams(min_tokens=2)}),
    ("request_id", {"request_id": "x" * 129}),
    ("request_id", {"request_id": "a\nb"}),
    ("objectives.ttft", {"objectives": inference_pb2.Objectives(ttft=Duration())}),
    ("objectives.tbt", {"objectives": inference_pb2.Objectives(tbt=Duration(seconds=-1))}),
    ("resume_token_ids", {"resume_token_ids": [257]}),
    ("resume_token_ids", {"resume_token_ids": [1] * 2049}),
    (
        "resume_token_ids",
        {"resume_token_ids": [1, 2], "sampling": SamplingParams(max_tokens=1)},
    ),
]


@pytest.mark.parametrize(("field", "fields"), BAD_REQUESTS)
async def test_requests(
    served: Serving, worker: FakeWorker, field: str, fields: dict[str, Any]
) -> None:
    assert await wrong_field(served.generate(**fields)) == field


async def test_a_batch_in_flight_is_undisturbed(served: Serving, worker: FakeWorker) -> None:
    worker.gate.hold()
    good = served.generate(text="good", sampling=SamplingParams(max_tokens=5))
    await read_event(good, "started")
    for _, sampling in BAD_SAMPLING[:4]:
        await failure(served.generate(sampling=sampling))
    worker.gate.open()
    chunk = await read_event(good, "token_chunk")
    assert len(chunk.token_ids) >= 1


async def test_another_model_is_not_found(served: Serving, worker: FakeWorker) -> None:
    assert isinstance(await failure(served.generate(model="other")), NotFoundError)
    for call in (
        served.inference.GetModel(inference_pb2.GetModelRequest(model="other")),
        served.inference.CountTokens(inference_pb2.CountTokensRequest(model="other", text="a")),
    ):
        assert isinstance(await failure(call), NotFoundError)


async def test_an_id_in_use_already_exists(served: Serving, worker: FakeWorker) -> None:
    worker.gate.hold()
    first = served.generate(request_id="r1", sampling=SamplingParams(max_tokens=2))
    await read_event(first, "started")
    assert isinstance(await failure(served.generate(request_id="r1")), AlreadyExistsError)
    worker.gate.open()
    await read_event(first, "token_chunk")
    await served.all_is_free()
    assert (await served.answer(request_id="r1")).started.request_id == "r1"


async def test_without_a_worker_it_is_unavailable(served: Serving) -> None:
    assert isinstance(await failure(served.generate()), UnavailableError)
    request = inference_pb2.GetModelRequest()
    assert isinstance(await failure(served.inference.GetModel(request)), UnavailableError)


async def test_text_without_a_tokenizer_is_refused() -> None:
    model = FakeModel(tokenizer_json=b"")
    async with serving() as served, FakeWorker(served.address, model=model):
        assert isinstance(await failure(served.generate(text="a")), FailedPreconditionError)
        stops = SamplingParams(stop_strings=["a"])
        assert isinstance(await failure(served.generate(sampling=stops)), FailedPreconditionError)
        request = inference_pb2.CountTokensRequest(text="a")
        error = await failure(served.inference.CountTokens(request))
        assert isinstance(error, FailedPreconditionError)


async def test_a_full_queue_says_when_to_try_again() -> None:
    async with (
        serving(max_waiting=1, pipeline_depth=1) as served,
        FakeWorker(served.address, max_num_seqs=1) as worker,
    ):
        worker.gate.hold()
        calls = []
        for _ in range(2):  # one runs, one waits
            call = served.generate(sampling=SamplingParams(max_tokens=2))
            await read_event(call, "started")
            calls.append(call)
        error = await failure(served.generate())
        assert isinstance(error, ResourceExhaustedError)
        assert error.retry_after_seconds is not None
        assert error.retry_after_seconds > 0
        worker.gate.open()
        await served.all_is_free()


async def test_more_than_the_pool_can_ever_hold_is_refused() -> None:
    async with serving() as served, FakeWorker(served.address, pool_units=8) as _:
        field = await wrong_field(served.generate(sampling=SamplingParams(max_tokens=100)))
        assert field == "sampling.max_tokens"


@pytest.mark.parametrize("num_ids", [0, 1001])
async def test_abort_takes_1_to_1000_ids(served: Serving, num_ids: int) -> None:
    request = inference_pb2.AbortRequest(request_ids=["x"] * num_ids)
    assert await wrong_field(served.inference.Abort(request)) == "request_ids"


async def test_the_text_to_count_has_a_limit(served: Serving, worker: FakeWorker) -> None:
    request = inference_pb2.CountTokensRequest(text="x" * ((4 << 20) + 1))
    assert await wrong_field(served.inference.CountTokens(request)) == "text"


@pytest.mark.parametrize("seconds", [0, -1, 3601])
async def test_the_drain_timeout_has_a_range(served: Serving, seconds: int) -> None:
    request = admin_pb2.DrainRequest(timeout=Duration(seconds=seconds))
    assert await wrong_field(served.admin.Drain(request)) == "timeout"


RAW = [
    ("text", b"\x1a\x02\xff\xfe"),
    ("request_id", b"\x0a\x01\xc0"),
    ("sampling.stop_strings", b"\x2a\x03\x72\x01\xff"),
    ("request", b"\x1a\x7f"),
]


@pytest.mark.parametrize(("field", "raw"), RAW)
async def test_bytes_that_are_no_message(served: Serving, field: str, raw: bytes) -> None:
    call = served.channel.unary_stream("/aptserve.v1.InferenceService/Generate")
    assert await wrong_field(call(raw, timeout=CALL_SECONDS)) == field


async def test_bytes_that_are_no_message_in_every_kind_of_call(served: Serving) -> None:
    unary = served.channel.unary_unary("/aptserve.v1.InferenceService/Abort")
    assert await wrong_field(unary(b"\x0a\x01\xff", timeout=CALL_SECONDS)) == "request_ids"
    stream = served.channel.stream_stream("/aptserve.v1.WorkerGateway/Attach")
    register_with_bad_id = b"\x0a\x03\x12\x01\xff"
    call = stream(iter([register_with_bad_id]), timeout=CALL_SECONDS)
    assert await wrong_field(call) == "register.worker_id"
    health = served.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await wrong_field(health(b"\x0a\x01\xff", timeout=CALL_SECONDS)) == "service"


async def test_a_long_text_is_tokenised(served: Serving, worker: FakeWorker) -> None:
    request = inference_pb2.CountTokensRequest(text="x" * (1 << 20))
    reply = await served.inference.CountTokens(request, timeout=30)
    assert reply.num_tokens == 1 << 20


async def test_the_reason_is_in_the_details(served: Serving, worker: FakeWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(served.generate(sampling=SamplingParams(top_p=2)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling.top_p" in (caught.value.details() or "")


async def test_a_fault_of_ours_is_logged_and_told_as_a_fixed_text(
    served: Serving, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("details for the log alone")

    monkeypatch.setattr(served.service.driver, "submit", broken)
    with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(served.generate())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"
    [logged] = [entry for entry in logs if entry["log_level"] == "error"]
    assert str(logged["exc_info"]) == "details for the log alone"
