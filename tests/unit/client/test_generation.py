"""Folding and the decision to resume, without I/O."""

from __future__ import annotations

import contextlib
from typing import Any

import aptserve
import pytest
from aptserve._generation import Generation, ResumePolicy
from aptserve.v1 import inference_pb2, types_pb2
from support.fake_service import chunk, finished, started

GONE = aptserve.UnavailableError("gone")


def make_generation(
    *, resume: bool = True, timeout: float = 30.0, deadline: float | None = None, **fields: Any
) -> Generation:
    request = inference_pb2.GenerateRequest(text="prompt", **fields)
    return Generation(request, ResumePolicy(resume, timeout), deadline=deadline)


def test_text_may_lag_behind_tokens() -> None:
    generation = make_generation()
    generation.fold(started())
    lagging = inference_pb2.TokenChunk(token_ids=[195])
    folded = generation.fold(inference_pb2.GenerateResponse(token_chunk=lagging))
    assert folded == aptserve.Chunk("", (195,))
    rest = inference_pb2.TokenChunk(token_ids=[169], text="é")
    generation.fold(inference_pb2.GenerateResponse(token_chunk=rest))
    assert generation.fold(finished(2)) is None
    assert generation.result is not None
    assert (generation.result.text, generation.result.token_ids) == ("é", (195, 169))


def test_unknown_event_is_passed_over() -> None:
    assert make_generation().fold(inference_pb2.GenerateResponse()) is None


def test_next_request_brings_received_tokens_after_the_callers() -> None:
    generation = make_generation(resume_token_ids=[1, 2])
    assert list(generation.next_request().resume_token_ids) == [1, 2]
    generation.fold(started("chosen"))
    generation.fold(chunk("ab"))
    request = generation.next_request()
    assert list(request.resume_token_ids) == [1, 2, 97, 98]
    assert request.request_id == "chosen"
    assert list(generation.next_request().resume_token_ids) == [1, 2, 97, 98], "not cumulative"


def test_delays_grow_and_end() -> None:
    generation = make_generation(timeout=30.0)
    generation.fold(started())
    now, delays = 100.0, []
    with contextlib.suppress(aptserve.UnavailableError):
        while len(delays) < 1000:
            delays.append(generation.on_error(GONE, now))
            now += delays[-1]
    assert 28 < sum(delays) <= 30
    assert 0.05 <= delays[0] <= 0.1
    assert max(delays) <= 2.0
    assert generation.num_resumes == len(delays)


def test_progress_starts_the_clock_again() -> None:
    generation = make_generation(timeout=1.0)
    generation.fold(started())
    generation.on_error(GONE, 100.0)
    generation.fold(started())
    with pytest.raises(aptserve.UnavailableError):
        generation.on_error(GONE, 102.0)
    generation.fold(chunk("a"))
    assert generation.on_error(GONE, 200.0) <= 0.1


def test_nothing_is_resumed_before_it_was_accepted() -> None:
    with pytest.raises(aptserve.UnavailableError):
        make_generation().on_error(GONE, 0.0)


@pytest.mark.parametrize(
    "error", [aptserve.AlreadyExistsError("id"), aptserve.ResourceExhaustedError("full", 0.5)]
)
def test_obstacles_count_only_while_resuming(error: aptserve.AptServeError) -> None:
    generation = make_generation()
    generation.fold(started())
    with pytest.raises(type(error)):
        generation.on_error(error, 0.0)
    generation.on_error(GONE, 0.0)
    delay = generation.on_error(error, 0.1)
    if isinstance(error, aptserve.ResourceExhaustedError):
        assert delay >= 0.5, "as long as the service asked for"


def test_deadline_bounds_streams_and_waits() -> None:
    generation = make_generation(deadline=10.0)
    generation.fold(started())
    assert generation.timeout_seconds(4.0) == 6.0
    assert generation.timeout_seconds(11.0) == 0.0
    with pytest.raises(aptserve.DeadlineExceededError):
        generation.on_error(GONE, 9.99)
    assert make_generation().timeout_seconds(4.0) is None


def test_stream_must_end_with_finished() -> None:
    generation = make_generation()
    generation.fold(started())
    with pytest.raises(aptserve.InternalError):
        generation.on_end()
    generation.fold(finished(0, types_pb2.FINISH_REASON_STOP))
    generation.on_end()
