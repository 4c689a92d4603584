"""Streams that break because the service went away go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import aptserve
import pytest
from aptserve import _generation
from aptserve.errors import AptServeError
from aptserve.v1 import types_pb2
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

GONE = aptserve.UnavailableError("the scheduler is stopping")


@pytest.fixture(autouse=True)
def _quick_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_generation, "_FIRST_DELAY_SECONDS", 0.005)


@pytest.mark.parametrize("break_after", [0, 1, 5, len(ANSWER)])
async def test_caller_sees_no_gap_and_no_repeat(
    api: Any, service: FakeService, read: Any, break_after: int
) -> None:
    service.script(answer(break_after=break_after, error=GONE))
    stream = await api.open("prompt", temperature=0.5, max_tokens=20)
    chunks = await read(api, stream)
    assert "".join(c.text for c in chunks) == ANSWER
    assert stream.result.text == ANSWER
    assert stream.result.token_ids == tuple(ANSWER.encode())
    assert stream.num_resumes == 1
    first, second = service.requests
    assert bytes(second.resume_token_ids).decode() == ANSWER[:break_after]
    assert second.request_id == "made-up"
    assert first.sampling == second.sampling
    assert first.text == second.text


async def test_many_breaks(api: Any, service: FakeService) -> None:
    service.script(*[answer(break_after=1, error=GONE)] * (len(ANSWER) - 1))
    completion = await api.call("complete", "prompt")
    assert completion.text == ANSWER
    assert completion.usage.num_output_tokens == len(ANSWER)


async def test_tokens_of_the_caller_come_first(api: Any, service: FakeService) -> None:
    service.script(answer(break_after=2, error=GONE))
    completion = await api.call("complete", "prompt", resume_token_ids=list(b"the"))
    assert completion.text == ANSWER[3:]
    assert bytes(service.requests[1].resume_token_ids).decode() == ANSWER[:5]


async def test_logprobs_stay_aligned(api: Any, service: FakeService) -> None:
    def with_logprobs(*letters: str, error: AptServeError | None = None) -> Any:
        def generate(request: Any, context: Any) -> Iterator[Any]:
            yield started()
            for letter in letters:
                chosen = types_pb2.TokenLogprob(token_id=ord(letter), logprob=-1.0)
                yield chunk(letter, logprobs=[types_pb2.PositionLogprobs(chosen=chosen)])
            if error is not None:
                context.abort(error.code, error.message)
            yield finished(len(letters))

        return generate

    service.script(with_logprobs("a", "b", error=GONE), with_logprobs("c"))
    completion = await api.call("complete", "prompt", logprobs=0)
    assert [p.chosen.token_id for p in completion.logprobs] == list(completion.token_ids)


async def test_opt_out(make_api: Any, service: FakeService) -> None:
    service.script(answer(break_after=2, error=GONE))
    stream = await (api := make_api(service.address, resume=False)).open("prompt")
    assert [(await api.next(stream)).text for _ in range(2)] == ["t", "h"]
    with pytest.raises(aptserve.UnavailableError, match="stopping"):
        await api.next(stream)


async def test_only_unavailable_is_resumed(api: Any, service: FakeService) -> None:
    service.script(answer(break_after=2, error=aptserve.InternalError("broken")))
    with pytest.raises(aptserve.InternalError):
        await api.call("complete", "prompt")
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "error",
    [
        aptserve.AlreadyExistsError("the old stream is not gone yet"),
        aptserve.ResourceExhaustedError("others came back first", 0.01),
        aptserve.UnavailableError("no worker yet"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_obstacles_after_a_restart_are_waited_out(
    api: Any, service: FakeService, error: AptServeError
) -> None:
    service.script(answer(break_after=3, error=GONE), *[fail(error)] * 2)
    completion = await api.call("complete", "prompt")
    assert completion.text == ANSWER


async def test_other_errors_end_the_attempt(api: Any, service: FakeService) -> None:
    service.script(answer(break_after=3, error=GONE), fail(aptserve.NotFoundError("another model")))
    with pytest.raises(aptserve.NotFoundError):
        await api.call("complete", "prompt")


async def test_gives_up_without_progress(make_api: Any, service: FakeService) -> None:
    service.script(answer(break_after=3, error=GONE), *[answer(break_after=0, error=GONE)] * 1000)
    api = make_api(service.address, resume_timeout=0.1)
    with pytest.raises(aptserve.UnavailableError):
        await api.call("complete", "prompt")


async def test_deadline_holds_across_streams(api: Any, service: FakeService) -> None:
    service.script(answer(break_after=3, error=GONE), *[answer(break_after=0, error=GONE)] * 1000)
    with pytest.raises(aptserve.DeadlineExceededError):
        await api.call("complete", "prompt", timeout=0.2)
    first, *_, last = service.time_remaining
    assert first is not None
    assert last is not None
    assert last < first


async def test_cancel_while_the_stream_is_broken(
    api: Any, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_generation, "_FIRST_DELAY_SECONDS", 20.0)
    monkeypatch.setattr(_generation, "_MOST_DELAY_SECONDS", 20.0)
    service.script(answer(break_after=0, error=GONE))
    stream = await api.open("prompt")
    reading = asyncio.create_task(api.next(stream))
    await asyncio.to_thread(service.wait_ended)
    stream.cancel()
    with pytest.raises(aptserve.CancelledError):
        await asyncio.wait_for(reading, WAIT_SECONDS)
    assert len(service.requests) == 1


async def test_service_restarts_on_the_same_port(make_api: Any, read: Any) -> None:
    def hold(request: Any, context: Any) -> Iterator[Any]:
        gone = threading.Event()
        context.add_callback(gone.set)
        yield started()
        for letter in ANSWER[:4]:
            yield chunk(letter)
        gone.wait(WAIT_SECONDS)

    with fake_service() as service:
        service.script(hold)
        api = make_api(service.address)
        stream = await api.open("prompt")
        before = [await api.next(stream) for _ in range(4)]
    with fake_service(service.port) as again:
        after = await read(api, stream)
        assert len(again.requests) == 1
    assert "".join(c.text for c in before + after) == ANSWER
