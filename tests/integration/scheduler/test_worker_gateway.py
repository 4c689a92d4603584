"""Attach over loopback: who is let in, what ends a stream, and what becomes of the requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from aptserve.errors import (
    AlreadyExistsError,
    AptServeError,
    FailedPreconditionError,
    InvalidArgumentError,
    ProtocolError,
    from_rpc_error,
)
from aptserve.v1 import types_pb2, worker_pb2
from aptserve.v1.types_pb2 import SamplingParams, TokenIds
from aptserve_scheduler.api import worker_gateway
from aptserve_scheduler.core import Scheduler, WorkerId
from aptserve_worker.fake import FakeModel, FakeWorker, Fault, FaultKind, expected_tokens
from aptserve_worker.plan import Sampling
from aptserve_worker.session import RefusedError
from support.eventually import eventually
from support.scheduling import (
    ScriptedWorker,
    Serving,
    collect,
    make_register,
    read_event,
    read_to_end,
    serving,
)

PROMPT = list(b"once upon a time")


async def refusal(worker: ScriptedWorker) -> AptServeError:
    """The error that the worker's stream ends with."""

    async def finish() -> None:
        while await worker.call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(finish(), 10)
    return from_rpc_error(caught.value)


def pool(**fields: Any) -> worker_pb2.PoolInfo:
    message = worker_pb2.PoolInfo()
    message.CopyFrom(make_register().pool)
    for name, value in fields.items():
        message.ClearField(name)  # type: ignore[arg-type]
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def model(**fields: Any) -> worker_pb2.ModelInfo:
    message = worker_pb2.ModelInfo()
    message.CopyFrom(make_register().model)
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


KV, HIDDEN = types_pb2.CACHE_TIER_KV, types_pb2.CACHE_TIER_HIDDEN
BAD_REGISTERS: list[tuple[str, dict[str, Any]]] = [
    ("worker_id", {"worker_id": ""}),
    ("worker_id", {"worker_id": "x" * 129}),
    ("pool.num_units", {"pool": pool(num_units=0)}),
    ("pool.num_units", {"pool": pool(num_units=2**63)}),
    ("pool.block_size", {"pool": pool(block_size=0)}),
    ("pool.tiers", {"pool": pool(tiers=[])}),
    ("pool.tiers", {"pool": pool(tiers=[worker_pb2.TierInfo(tier=HIDDEN, units_per_block=1)])}),
    ("pool.tiers.tier", {"pool": pool(tiers=[worker_pb2.TierInfo(units_per_block=1)])}),
    (
        "pool.tiers.units_per_block",
        {"pool": pool(tiers=[worker_pb2.TierInfo(tier=KV, units_per_block=65)])},
    ),
    ("max_num_seqs", {"max_num_seqs": 0}),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 0}),
    (
        "calibration.base_seconds",
        {"calibration": worker_pb2.Calibration(base_seconds=float("nan"))},
    ),
    (
        "calibration.seconds_per_token",
        {"calibration": worker_pb2.Calibration(seconds_per_token=-1.0)},
    ),
    ("model.name", {"model": model(name="")}),
    ("model.fingerprint", {"model": model(fingerprint="")}),
    ("model.context_length", {"model": model(context_length=0)}),
    ("model.eos_token_ids", {"model": model(eos_token_ids=[257])}),
    ("model.tokenizer_json", {"model": model(tokenizer_json=b"{}")}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_REGISTERS)
async def test_a_bad_register_names_the_field(
    served: Serving, field: str, fields: dict[str, Any]
) -> None:
    error = await refusal(await ScriptedWorker.attach(served, **fields))
    assert isinstance(error, InvalidArgumentError), error
    assert error.field == f"register.{field}"
    assert not await served.is_serving()


async def test_the_first_message_must_be_register(served: Serving) -> None:
    worker = ScriptedWorker(served.gateway.Attach(timeout=10))
    await worker.send(leaving=worker_pb2.Leaving())
    error = await refusal(worker)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == "register"


async def test_register_must_come_in_time(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_gateway, "_REGISTER_TIMEOUT_SECONDS", 0.05)
    worker = ScriptedWorker(served.gateway.Attach(timeout=10))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.call.read()
    assert "no Register" in (caught.value.details() or "")


async def test_another_protocol_version_is_refused(served: Serving) -> None:
    error = await refusal(await ScriptedWorker.attach(served, protocol_version=2))
    assert isinstance(error, FailedPreconditionError)


async def test_another_model_is_refused_while_one_is_served(
    served: Serving, worker: FakeWorker
) -> None:
    with pytest.raises(RefusedError, match="is served here"):
        async with FakeWorker(served.address, model=FakeModel(salt=1)):
            pass


async def test_another_model_may_come_when_nothing_is_left_of_the_first(served: Serving) -> None:
    async with FakeWorker(served.address):
        assert (await served.answer(sampling=SamplingParams(max_tokens=1))).started.model == "fake"
    await eventually(lambda: not served.service.driver.workers)
    async with FakeWorker(served.address, model=FakeModel(name="second", salt=1)):
        answer = await served.answer(sampling=SamplingParams(max_tokens=1))
        assert answer.started.model == "second"


async def test_a_worker_id_is_attached_once(served: Serving, worker: FakeWorker) -> None:
    register = {"worker_id": "w1", "model": model(fingerprint="fake-257-0")}
    error = await refusal(await ScriptedWorker.attach(served, **register))
    assert isinstance(error, AlreadyExistsError)
    assert await served.is_serving()


Spoil = Callable[[ScriptedWorker, worker_pb2.BatchPlan], Awaitable[None]]


async def wrong_plan(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.answer(plan, 1, plan_id=plan.plan_id + 7)


async def wrong_sequence(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.answer(plan, 1, outputs=[worker_pb2.SequenceOutput(sequence_id=99)])


async def wrong_units(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.answer(plan, 1, num_free_units=1)


async def wrong_time(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.answer(plan, 1, step_seconds=float("nan"))


async def second_register(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.send(register=make_register())


async def nothing_at_all(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    await worker.send()


async def an_abort(worker: ScriptedWorker, plan: worker_pb2.BatchPlan) -> None:
    output = worker_pb2.SequenceOutput(
        sequence_id=plan.scheduled[0].sequence_id,
        token_ids=[1],
        finish_reason=types_pb2.FINISH_REASON_ABORT,
    )
    await worker.answer(plan, 1, outputs=[output])


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_plan,
        wrong_sequence,
        wrong_units,
        wrong_time,
        second_register,
        nothing_at_all,
        an_abort,
    ],
)
async def test_a_broken_protocol_costs_the_stream_and_no_request(
    served: Serving, spoil: Spoil
) -> None:
    worker = await ScriptedWorker.attach(served)
    assert (await worker.read("registered")).pipeline_depth == 2
    call = served.generate(sampling=SamplingParams(max_tokens=1))
    await read_event(call, "started")
    await spoil(worker, await worker.read("batch_plan"))
    assert isinstance(await refusal(worker), ProtocolError)
    again = await ScriptedWorker.attach(served)
    await again.read("registered")
    plan = await again.read("batch_plan")
    await again.answer(plan, 65, num_free_units=62)
    chunk, end = await read_to_end(call)
    assert list(chunk.token_chunk.token_ids) == [65]
    assert end.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert list((await again.read("release")).sequence_ids) == [plan.scheduled[0].sequence_id]
    again.call.cancel()


async def test_a_failed_sequence_fails_its_request_alone() -> None:
    async with (
        serving() as served,
        FakeWorker(served.address, faults=[Fault(2, FaultKind.NAN)]),
    ):
        calls = [served.generate(sampling=SamplingParams(max_tokens=5)) for _ in range(3)]
        results = await asyncio.gather(*map(collect, calls), return_exceptions=True)
        errors = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
        assert len(errors) == 1
        assert errors[0].code() is grpc.StatusCode.INTERNAL
        assert errors[0].details() == "internal error"
        await served.all_is_free()


@pytest.mark.parametrize("kind", [FaultKind.DROP_STREAM, FaultKind.ERROR, FaultKind.WRONG_PLAN_ID])
async def test_a_lost_worker_costs_no_token(kind: FaultKind) -> None:
    async with serving() as served, FakeWorker(served.address, faults=[Fault(5, kind)]):
        sampling = SamplingParams(max_tokens=20)
        answer = await served.answer(token_ids=TokenIds(ids=PROMPT), sampling=sampling)
        expected, _ = expected_tokens(FakeModel(), PROMPT, Sampling(max_tokens=20, seed=0))
        assert answer.token_ids == expected
        assert answer.text == bytes(expected).decode()
        assert answer.finished.timing.num_preemptions >= 1


async def test_another_worker_goes_on_with_the_stream(served: Serving) -> None:
    first = FakeWorker(served.address, worker_id="first")
    async with first:
        first.gate.hold()
        hot = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
        call = served.generate(token_ids=TokenIds(ids=PROMPT), sampling=hot)
        await read_event(call, "started")
        first.gate.allow(4)
        got: list[int] = []
        while len(got) < 4:
            got += (await read_event(call, "token_chunk")).token_ids
        async with FakeWorker(served.address, worker_id="second"):
            first.gate.open()
            await first.kill()
            for event in await read_to_end(call):
                got += event.token_chunk.token_ids
        sampled = Sampling(max_tokens=12, seed=3, temperature=1.0)
        assert got == expected_tokens(FakeModel(), PROMPT, sampled)[0]


async def test_a_worker_that_does_not_answer_is_cut() -> None:
    """It is alive, its stream too, but the step under way never ends."""
    async with serving(plan_timeout_seconds=0.2) as served:
        stuck = FakeWorker(served.address, worker_id="stuck")
        async with stuck:
            stuck.gate.hold()
            call = served.generate(sampling=SamplingParams(max_tokens=20))
            await read_event(call, "started")
            async with FakeWorker(served.address, worker_id="other"):
                events = await read_to_end(call)
                assert events[-1].finished.usage.num_output_tokens == 20
                assert "stuck" not in served.service.driver.workers
            stuck.gate.open()


async def test_a_slow_worker_is_not_cut() -> None:
    """What counts is the time without any answer, not that of all of them."""
    async with (
        serving(plan_timeout_seconds=0.3) as served,
        FakeWorker(served.address, step_seconds=0.03) as worker,
    ):
        await served.answer(sampling=SamplingParams(max_tokens=30))
        assert worker.session.num_attachments == 1


async def test_a_worker_that_leaves_hands_its_requests_on(served: Serving) -> None:
    first = FakeWorker(served.address, worker_id="first", step_seconds=0.002)
    async with first, FakeWorker(served.address, worker_id="second", step_seconds=0.002):
        calls = [served.generate(sampling=SamplingParams(max_tokens=60)) for _ in range(6)]
        for call in calls:
            await read_event(call, "started")
        await eventually(lambda: first.engine.num_steps > 3)
        await first.leave()
        assert list(served.service.driver.workers) == ["second"]
        for call in calls:
            events = await read_to_end(call)
            assert events[-1].finished.usage.num_output_tokens == 60


async def test_an_idle_worker_leaves_at_once(served: Serving) -> None:
    async with FakeWorker(served.address) as worker:
        await worker.leave(timeout_seconds=5)
    assert not await served.is_serving()


async def test_two_workers_share_the_work(served: Serving) -> None:
    async with (
        FakeWorker(served.address, worker_id="a", step_seconds=0.001) as a,
        FakeWorker(served.address, worker_id="b", step_seconds=0.001) as b,
    ):
        calls = []
        for _ in range(4):  # one after the other, so that each finds the workers as they are
            call = served.generate(sampling=SamplingParams(max_tokens=50))
            await read_event(call, "started")
            await read_event(call, "token_chunk")
            calls.append(call)
        for call in calls:
            await read_to_end(call)
        assert a.engine.num_steps > 20
        assert b.engine.num_steps > 20


async def test_depth_1_sends_one_plan_at_a_time() -> None:
    async with serving(pipeline_depth=1) as served:
        worker = await ScriptedWorker.attach(served)
        assert (await worker.read("registered")).pipeline_depth == 1
        call = served.generate(sampling=SamplingParams(max_tokens=3))
        # The third step is the first with 5 cached tokens, 2 blocks of 4.
        for number, num_free in ((1, 62), (2, 62), (3, 60)):
            plan = await worker.read("batch_plan")
            assert plan.plan_id == number
            [status] = served.service.driver.snapshot().workers
            assert status.num_plans_in_flight == 1
            await worker.answer(plan, 65 + number, num_free_units=num_free)
        answer = await collect(call)
        assert answer.token_ids == [66, 67, 68]
        worker.call.cancel()


async def test_a_fault_of_the_core_ends_requests_and_not_the_service(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scheduler: Scheduler, worker_id: WorkerId, now: float) -> None:
        raise RuntimeError("injected fault of planning")

    async with FakeWorker(served.address) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "plan", broken)
            call = served.generate(sampling=SamplingParams(max_tokens=3))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_end(call)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "internal error"
        await worker.wait_attached(num_attachments=worker.session.num_attachments)
        await eventually(served.is_serving)
        answer = await served.answer(sampling=SamplingParams(max_tokens=3))
        assert len(answer.token_ids) == 3
