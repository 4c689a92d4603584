"""Both clients against a scripted service."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import aptserve
import pytest
from aptserve import (
    Chunk,
    Client,
    Completion,
    FinishReason,
    Objectives,
    PositionLogprobs,
    SamplingParams,
    Timing,
    TokenLogprob,
    Usage,
)
from aptserve.v1 import inference_pb2, types_pb2
from google.protobuf import duration_pb2
from support.fake_service import (
    ANSWER,
    WAIT_SECONDS,
    FakeService,
    answer,
    chunk,
    fail,
    fake_service,
    finished,
    started,
)


def hang(*responses: Any) -> Any:
    """Send the responses, then nothing until the client goes away."""

    def generate(request: Any, context: Any) -> Iterator[Any]:
        gone = threading.Event()
        context.add_callback(gone.set)
        yield from responses
        gone.wait(WAIT_SECONDS)

    return generate


async def test_streams_chunks_then_has_a_result(api: Any, read: Any) -> None:
    stream = await api.open("prompt")
    first = await api.next(stream)
    assert first == Chunk("t", (116,))
    assert stream.request_id == "made-up"
    assert stream.text == "t"
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.result
    await read(api, stream)
    assert stream.result.text == stream.text == ANSWER
    assert stream.token_ids == tuple(ANSWER.encode())
    assert await api.next(stream) is None
    assert stream.num_resumes == 0


async def test_completion_has_everything(api: Any, service: FakeService) -> None:
    logprobs = types_pb2.PositionLogprobs(
        chosen=types_pb2.TokenLogprob(token_id=104, logprob=-0.5),
        top=[types_pb2.TokenLogprob(token_id=105, logprob=-0.25)],
    )

    def seconds(value: float) -> duration_pb2.Duration:
        return duration_pb2.Duration(nanos=int(value * 1e9))

    end = finished(
        1,
        types_pb2.FINISH_REASON_STOP,
        matched_stop_string="end",
        matched_stop_token_id=0,
        timing=inference_pb2.Timing(
            queued=seconds(0.125),
            time_to_first_token=seconds(0.25),
            time_between_tokens_p99=seconds(0.5),
            total=seconds(0.75),
            num_preemptions=2,
        ),
    )
    service.script(lambda *_: iter((started("mine"), chunk("h", logprobs=[logprobs]), end)))
    assert await api.call("complete", "prompt", request_id="mine") == Completion(
        request_id="mine",
        model="fake",
        text="h",
        token_ids=(104,),
        logprobs=(PositionLogprobs(TokenLogprob(104, -0.5), (TokenLogprob(105, -0.25),)),),
        finish_reason=FinishReason.STOP,
        matched_stop_string="end",
        matched_stop_token_id=0,
        usage=Usage(3, 1),
        timing=Timing(0.125, 0.25, 0.5, 0.75, 2),
    )


async def test_what_is_unset_is_none(api: Any, service: FakeService) -> None:
    end = finished(0, types_pb2.FINISH_REASON_ABORT)
    service.script(lambda *_: iter((started(), end)))
    completion = await api.call("complete", "prompt")
    assert completion.finish_reason is FinishReason.ABORT
    assert completion.matched_stop_string is None
    assert completion.matched_stop_token_id is None
    assert completion.timing.time_to_first_token_seconds is None
    assert completion.timing.time_between_tokens_p99_seconds is None


async def test_request_carries_all_arguments(api: Any, service: FakeService) -> None:
    await api.call(
        "complete",
        token_ids=[1, 2],
        sampling=SamplingParams(max_tokens=5, stop_strings=["x"]),
        objectives=Objectives(ttft_seconds=0.5, tbt_seconds=0.25),
        request_id="mine",
        model="fake",
        timeout=7,
        resume_token_ids=list(b"the"),
        tenant="team",
        priority=-3,
        expected_output_tokens=4,
    )
    request = service.requests[0]
    assert list(request.token_ids.ids) == [1, 2]
    assert request.sampling.max_tokens == 5
    assert list(request.sampling.stop_strings) == ["x"]
    assert request.objectives.ttft.nanos == 500_000_000
    assert request.objectives.tbt.nanos == 250_000_000
    assert (request.request_id, request.model) == ("mine", "fake")
    assert bytes(request.resume_token_ids) == b"the"
    assert (request.tenant, request.priority, request.expected_output_tokens) == ("team", -3, 4)
    assert service.time_remaining[0] is not None
    assert 5 < service.time_remaining[0] < 8


async def test_sampling_fields_may_be_given_directly(api: Any, service: FakeService) -> None:
    await api.call("complete", "prompt", max_tokens=5, temperature=0.5, logprobs=0)
    sampling = service.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (5, 0.5)
    assert sampling.HasField("logprobs")
    assert sampling.HasField("seed"), "a resumed stream must keep it"
    with pytest.raises(TypeError, match="top_k"):
        await api.call("complete", "prompt", sampling=SamplingParams(), top_k=1)


async def test_api_key_and_address_come_from_the_environment(
    make_api: Any, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APTSERVE_ADDRESS", service.address)
    monkeypatch.setenv("APTSERVE_API_KEY", "key")
    await make_api(None).call("complete", "prompt")
    await make_api(None, api_key="other").call("complete", "prompt")
    assert [m["authorization"] for m in service.metadata] == ["Bearer key", "Bearer other"]


@pytest.mark.parametrize(
    "error",
    [
        aptserve.InvalidArgumentError("sampling.top_p", "must be in (0, 1]"),
        aptserve.NotFoundError("no such model"),
        aptserve.AlreadyExistsError("in use"),
        aptserve.ResourceExhaustedError("queue full", 1.5),
        aptserve.FailedPreconditionError("no tokenizer"),
        aptserve.UnauthenticatedError("wrong key"),
        aptserve.DeadlineExceededError("too late"),
        aptserve.CancelledError("gone"),
        aptserve.ProtocolError("confused"),
        aptserve.InternalError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_arrive_as_they_were_raised(
    api: Any, service: FakeService, error: aptserve.AptServeError
) -> None:
    service.script(fail(error))
    service.responses["GetModel"] = error
    for method, args in (("complete", ("prompt",)), ("get_model", ())):
        with pytest.raises(type(error)) as caught:
            await api.call(method, *args)
        assert caught.value.message == error.message
        assert vars(caught.value) == vars(error)


async def test_error_in_mid_stream_ends_it(api: Any, service: FakeService) -> None:
    service.script(answer(break_after=2, error=aptserve.InternalError("broken")))
    stream = await api.open("prompt")
    assert [(await api.next(stream)).text for _ in range(2)] == ["t", "h"]
    with pytest.raises(aptserve.InternalError):
        await api.next(stream)
    assert await api.next(stream) is None
    assert stream.text == "th"


async def test_stream_without_a_terminal_event_is_an_error(api: Any, service: FakeService) -> None:
    service.script(lambda *_: iter((started(), chunk("h"))))
    with pytest.raises(aptserve.InternalError, match="Finished"):
        await api.call("complete", "prompt")


async def test_unknown_finish_reason_is_an_error(api: Any, service: FakeService) -> None:
    end = finished(0, types_pb2.FINISH_REASON_UNSPECIFIED)
    service.script(lambda *_: iter((started(), end)))
    with pytest.raises(aptserve.InternalError, match="finish reason"):
        await api.call("complete", "prompt")


async def test_deadline(api: Any, service: FakeService) -> None:
    service.script(hang(started()))
    with pytest.raises(aptserve.DeadlineExceededError):
        await api.call("complete", "prompt", timeout=0.1)
    service.wait_ended()


async def test_cancel_ends_the_request_and_the_reader(api: Any, service: FakeService) -> None:
    service.script(hang(started(), chunk("h")))
    stream = await api.open("prompt")
    await api.next(stream)
    reading = asyncio.create_task(api.next(stream))
    await asyncio.sleep(0)
    stream.cancel()
    with pytest.raises(aptserve.CancelledError):
        await reading
    service.wait_ended()
    assert await api.next(stream) is None


@pytest.mark.parametrize("leave", ["context", "drop", "close"])
async def test_leaving_half_way_cancels(api: Any, service: FakeService, leave: str) -> None:
    service.script(hang(started(), chunk("h")))
    stream = await api.open("prompt")
    await api.next(stream)
    if leave == "drop":
        del stream
        gc.collect()
    elif leave == "close":
        await api.close()
        with pytest.raises(aptserve.CancelledError):
            await api.next(stream)
    elif hasattr(stream, "__enter__"):
        with stream:
            pass
    else:
        async with stream:
            pass
    await asyncio.to_thread(service.wait_ended)


async def test_cancelled_task_cancels_the_request(service: FakeService) -> None:
    service.script(hang(started(), chunk("h")))
    async with aptserve.AsyncClient(service.address) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.complete("prompt"), 0.1)
        await asyncio.to_thread(service.wait_ended)


async def test_closed_client_says_so(api: Any) -> None:
    await api.close()
    await api.close()
    for method in ("complete", "count_tokens"):
        with pytest.raises(RuntimeError, match="closed"):
            await api.call(method, "prompt")


async def test_nobody_listens(make_api: Any) -> None:
    with fake_service() as service:
        address = service.address
    with pytest.raises(aptserve.UnavailableError):
        await make_api(address).call("get_model")


async def test_unavailable_is_retried_before_the_first_event(
    api: Any, service: FakeService
) -> None:
    refuse = fail(aptserve.UnavailableError("no worker yet"))
    service.script(refuse, refuse)
    completion = await api.call("complete", "prompt")
    assert completion.text == ANSWER
    assert len(service.requests) == 3


async def test_retries_are_bounded(api: Any, service: FakeService) -> None:
    service.script(*[fail(aptserve.UnavailableError("no worker yet"))] * 6)
    with pytest.raises(aptserve.UnavailableError, match="no worker yet"):
        await api.call("complete", "prompt")
    assert len(service.requests) == 5


def test_one_client_serves_many_threads(service: FakeService) -> None:
    texts: list[str] = []
    with Client(service.address) as client:

        def work(number: int) -> None:
            texts.append(client.complete("prompt", request_id=f"r{number}").text)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
    assert texts == [ANSWER] * 8
    assert {r.request_id for r in service.requests} == {f"r{n}" for n in range(8)}


async def test_tls_is_used_with_credentials(make_api: Any, service: FakeService) -> None:
    import grpc

    api = make_api(service.address, credentials=grpc.ssl_channel_credentials(), timeout=2)
    with pytest.raises(aptserve.UnavailableError):
        await api.call("get_model")
    assert not service.requests
