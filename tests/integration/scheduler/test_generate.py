"""Generate over loopback: the stream, its text, its ends."""

from __future__ import annotations

import grpc
import pytest
from aptserve.v1 import inference_pb2, types_pb2
from aptserve.v1.types_pb2 import SamplingParams, TokenIds
from aptserve_worker.fake import FakeModel, FakeWorker, expected_tokens
from aptserve_worker.plan import Sampling
from support.eventually import eventually
from support.scheduling import CALL_SECONDS, Serving, collect, read_event, read_to_end, serving

PROMPT = list(b"once upon a time")


def greedy(prompt: list[int], max_tokens: int) -> list[int]:
    return expected_tokens(FakeModel(), prompt, Sampling(max_tokens=max_tokens, seed=0))[0]


async def test_a_text_prompt_gives_started_chunks_finished(
    served: Serving, worker: FakeWorker
) -> None:
    answer = await served.answer(
        text="once upon a time", request_id="r1", sampling=SamplingParams(max_tokens=20)
    )
    assert answer.started == inference_pb2.Started(
        request_id="r1", model="fake", num_prompt_tokens=len(PROMPT)
    )
    assert answer.token_ids == greedy(PROMPT, 20)
    assert answer.text == bytes(answer.token_ids).decode()
    assert answer.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert answer.finished.usage == inference_pb2.Usage(
        num_prompt_tokens=len(PROMPT), num_output_tokens=20
    )
    timing = answer.finished.timing
    assert timing.total.ToNanoseconds() >= timing.time_to_first_token.ToNanoseconds() > 0
    assert timing.HasField("time_between_tokens_p99")


async def test_token_ids_are_used_as_they_are_and_ids_are_chosen(
    served: Serving, worker: FakeWorker
) -> None:
    answer = await served.answer(
        token_ids=TokenIds(ids=PROMPT), model="fake", sampling=SamplingParams(max_tokens=3)
    )
    assert answer.token_ids == greedy(PROMPT, 3)
    assert answer.started.request_id


async def test_the_first_token_is_not_held_for_the_second(
    served: Serving, worker: FakeWorker
) -> None:
    worker.gate.hold()
    call = served.generate(sampling=SamplingParams(max_tokens=3))
    await read_event(call, "started")
    worker.gate.allow(1)
    first = await read_event(call, "token_chunk")
    assert len(first.token_ids) == 1
    worker.gate.open()
    rest = await read_to_end(call)
    assert rest[-1].finished.usage.num_output_tokens == 3


async def test_the_default_length_is_256_or_what_the_context_leaves() -> None:
    model = FakeModel(context_length=100)
    async with serving() as served, FakeWorker(served.address, model=model):
        answer = await served.answer(token_ids=TokenIds(ids=[97] * 90))
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert len(answer.token_ids) in (10, 11)


async def test_a_prompt_as_long_as_the_context_gets_one_token() -> None:
    model = FakeModel(context_length=64)
    async with serving() as served, FakeWorker(served.address, model=model):
        answer = await served.answer(token_ids=TokenIds(ids=[97] * 64))
        assert len(answer.token_ids) == 1


async def test_the_end_token_is_counted_and_sent_but_is_no_text() -> None:
    model = FakeModel(eos_after=4)
    async with serving() as served, FakeWorker(served.address, model=model):
        answer = await served.answer(text="abc")
        assert answer.token_ids[-1] == 256
        assert len(answer.token_ids) == 4
        assert len(answer.text) == 3
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        assert answer.finished.matched_stop_token_id == 256
        assert answer.finished.usage.num_output_tokens == 4
        ignoring = SamplingParams(ignore_eos=True, max_tokens=6)
        answer = await served.answer(text="abc", sampling=ignoring)
        assert not answer.finished.HasField("matched_stop_token_id")


async def test_an_ordinary_stop_token_is_no_text_either(
    served: Serving, worker: FakeWorker
) -> None:
    tokens = greedy(PROMPT, 20)
    stop = next(t for i, t in enumerate(tokens) if i >= 5 and t not in tokens[:i])
    sampling = SamplingParams(max_tokens=20, stop_token_ids=[stop])
    answer = await served.answer(token_ids=TokenIds(ids=PROMPT), sampling=sampling)
    upto = tokens.index(stop)
    assert answer.token_ids == tokens[: upto + 1]
    assert answer.text == bytes(tokens[:upto]).decode()
    assert answer.finished.matched_stop_token_id == stop


@pytest.mark.parametrize("num_tokens", [1, 3])
async def test_a_stop_string_ends_text_and_count(
    served: Serving, worker: FakeWorker, num_tokens: int
) -> None:
    tokens = greedy(PROMPT, 40)
    text = bytes(tokens).decode()
    stop = text[10 : 10 + num_tokens]
    start = text.index(stop)
    sampling = SamplingParams(max_tokens=40, stop_strings=["never", stop])
    answer = await served.answer(token_ids=TokenIds(ids=PROMPT), sampling=sampling)
    assert answer.text == text[:start]
    assert answer.token_ids == tokens[: start + num_tokens]
    assert answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
    assert answer.finished.matched_stop_string == stop
    assert answer.finished.usage.num_output_tokens == start + num_tokens


async def test_a_stop_string_in_the_very_last_token_counts(
    served: Serving, worker: FakeWorker
) -> None:
    tokens = greedy(PROMPT, 12)
    stop = bytes(tokens[-2:]).decode()
    sampling = SamplingParams(max_tokens=12, stop_strings=[stop])
    answer = await served.answer(token_ids=TokenIds(ids=PROMPT), sampling=sampling)
    assert answer.finished.matched_stop_string == stop


async def test_text_held_back_for_a_stop_string_comes_at_the_end(
    served: Serving, worker: FakeWorker
) -> None:
    tokens = greedy(PROMPT, 12)
    text = bytes(tokens).decode()
    sampling = SamplingParams(max_tokens=12, stop_strings=[text[-3:] + "!"])
    answer = await served.answer(token_ids=TokenIds(ids=PROMPT), sampling=sampling)
    assert answer.text == text
    assert answer.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_characters_arrive_whole() -> None:
    model = FakeModel(alphabet=tuple("é".encode()))
    async with serving() as served, FakeWorker(served.address, model=model):
        answer = await served.answer(text="abc", sampling=SamplingParams(max_tokens=64))
        raw = bytes(answer.token_ids)
        assert answer.text == raw.decode(errors="replace")
        assert len(answer.chunks) > 1


async def test_logprobs_come_one_per_token(served: Serving, worker: FakeWorker) -> None:
    answer = await served.answer(sampling=SamplingParams(max_tokens=5, logprobs=2))
    positions = [p for chunk in answer.chunks for p in chunk.logprobs]
    assert [p.chosen.token_id for p in positions] == answer.token_ids
    assert all(len(p.top) == 2 for p in positions)


async def test_a_seed_is_drawn_and_kept(served: Serving, worker: FakeWorker) -> None:
    hot = SamplingParams(max_tokens=12, temperature=1.0)
    drawn = [(await served.answer(sampling=hot)).token_ids for _ in range(3)]
    assert len({tuple(tokens) for tokens in drawn}) > 1
    hot.seed = 7
    seeded = [(await served.answer(sampling=hot)).token_ids for _ in range(2)]
    assert seeded[0] == seeded[1]


async def test_a_request_without_tokenizer_gets_tokens_alone() -> None:
    model = FakeModel(tokenizer_json=b"")
    async with serving() as served, FakeWorker(served.address, model=model):
        answer = await served.answer(sampling=SamplingParams(max_tokens=4))
        assert len(answer.token_ids) == 4
        assert answer.text == ""


async def test_resumed_tokens_count_and_are_not_sent_again(
    served: Serving, worker: FakeWorker
) -> None:
    tokens = greedy(PROMPT, 20)
    answer = await served.answer(
        token_ids=TokenIds(ids=PROMPT),
        sampling=SamplingParams(max_tokens=20),
        resume_token_ids=tokens[:8],
    )
    assert answer.token_ids == tokens[8:]
    assert answer.text == bytes(tokens[8:]).decode()
    assert answer.finished.usage.num_output_tokens == 20


async def test_a_stop_string_may_begin_in_the_resumed_tokens(
    served: Serving, worker: FakeWorker
) -> None:
    tokens = greedy(PROMPT, 20)
    text = bytes(tokens).decode()
    answer = await served.answer(
        token_ids=TokenIds(ids=PROMPT),
        sampling=SamplingParams(max_tokens=20, stop_strings=[text[6:10]]),
        resume_token_ids=tokens[:8],
    )
    assert answer.token_ids == tokens[8:10]
    assert answer.text == ""
    assert answer.finished.matched_stop_string == text[6:10]


@pytest.mark.parametrize("how", ["length", "token", "string"])
async def test_a_resumed_output_that_is_complete_only_lacks_its_end(
    served: Serving, worker: FakeWorker, how: str
) -> None:
    tokens = greedy(PROMPT, 20)
    sampling = SamplingParams(max_tokens=20)
    if how == "token":
        sampling = SamplingParams(max_tokens=30, stop_token_ids=[tokens[-1]])
    elif how == "string":
        sampling = SamplingParams(max_tokens=30, stop_strings=[bytes(tokens[-4:]).decode()])
    answer = await served.answer(
        token_ids=TokenIds(ids=PROMPT), sampling=sampling, resume_token_ids=tokens
    )
    assert answer.chunks == []
    assert answer.finished.usage.num_output_tokens == 20
    reason = {"length": "LENGTH"}.get(how, "STOP")
    assert types_pb2.FinishReason.Name(answer.finished.finish_reason).endswith(reason)


async def test_abort_finishes_the_stream_with_what_there_was(
    served: Serving, worker: FakeWorker
) -> None:
    worker.gate.hold()
    call = served.generate(request_id="r1", text="abc", sampling=SamplingParams(max_tokens=50))
    await read_event(call, "started")
    worker.gate.allow(1)
    await read_event(call, "token_chunk")
    request = inference_pb2.AbortRequest(request_ids=["r1", "r2", "r1"])
    reply = await served.inference.Abort(request, timeout=CALL_SECONDS)
    assert list(reply.aborted_request_ids) == ["r1"]
    finished = await read_event(call, "finished")
    assert finished.finish_reason == types_pb2.FINISH_REASON_ABORT
    again = await served.inference.Abort(request, timeout=CALL_SECONDS)
    assert list(again.aborted_request_ids) == []
    worker.gate.open()


async def test_a_client_that_cancels_frees_its_units(served: Serving, worker: FakeWorker) -> None:
    worker.gate.hold()
    call = served.generate(text="abc")
    await read_event(call, "started")
    worker.gate.allow(1)
    await read_event(call, "token_chunk")
    call.cancel()
    await eventually(lambda: served.service.driver.num_pending == 0)
    # The core has its units back before the worker has run another step.
    assert all(w.num_used_units == 0 for w in served.service.driver.snapshot().workers)


async def test_a_deadline_ends_the_request(served: Serving, worker: FakeWorker) -> None:
    worker.gate.hold()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(served.generate(text="abc", timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: served.service.driver.num_pending == 0)


async def test_many_streams_at_once_each_get_their_own_tokens(
    served: Serving, worker: FakeWorker
) -> None:
    prompts = [[*b"prompt ", 48 + i] for i in range(20)]
    calls = [
        served.generate(token_ids=TokenIds(ids=p), sampling=SamplingParams(max_tokens=15))
        for p in prompts
    ]
    for prompt, call in zip(prompts, calls, strict=True):
        assert (await collect(call)).token_ids == greedy(prompt, 15)


async def test_the_model_is_described(served: Serving, worker: FakeWorker) -> None:
    reply = await served.inference.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_SECONDS)
    assert reply == inference_pb2.GetModelResponse(
        model="fake",
        architecture="FakeForCausalLM",
        context_length=2048,
        vocab_size=257,
        eos_token_ids=[256],
        has_tokenizer=True,
        tiers=[types_pb2.CACHE_TIER_KV, types_pb2.CACHE_TIER_HIDDEN],
    )


async def test_tokens_are_counted(served: Serving, worker: FakeWorker) -> None:
    request = inference_pb2.CountTokensRequest(text="héllo")
    reply = await served.inference.CountTokens(request, timeout=CALL_SECONDS)
    assert list(reply.token_ids) == list("héllo".encode())
    assert reply.num_tokens == 6
