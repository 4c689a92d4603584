"""The worker's side of the protocol, against a scheduler played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from aptserve.v1 import types_pb2, worker_pb2
from aptserve_worker import session
from aptserve_worker.fake import FakeModel, FakeWorker, Fault, FaultKind, expected_tokens
from aptserve_worker.plan import Sampling
from aptserve_worker.session import Backoff, RefusedError, WorkerBrokenError
from support.fake_gateway import FakeGateway, GatewayStream, fake_gateway, make_plan, make_sequence

PROMPT = (104, 105)


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with fake_gateway() as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _fast_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Backoff", lambda: Backoff(0.001, 0.01))


async def _decode(stream: GatewayStream, num_tokens: int, *, first_plan: int = 1) -> list[int]:
    """Prefill sequence 1 and decode until it has so many tokens, one plan at a time."""
    tokens: list[int] = []
    for index in range(num_tokens):
        new = [make_sequence(prompt=PROMPT)] if index == 0 else []
        part = (1, 0, len(PROMPT)) if index == 0 else (1, len(PROMPT) + index - 1, 1)
        stream.plan(make_plan(first_plan + index, new=new, scheduled=[part]))
        result = await stream.result()
        assert result.plan_id == first_plan + index
        tokens += result.outputs[0].token_ids
    return tokens


async def test_registers_then_answers_plans_in_order(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, worker_id="w1", wait=False) as worker:
        stream = await gateway.accept(register=False)
        register = (await stream.receive()).register
        assert register.worker_id == "w1"
        assert register.resident_bytes > 1_000_000
        assert register.pool.num_units == worker.engine.model.num_units
        stream.registered()
        expected, _ = expected_tokens(FakeModel(), PROMPT, Sampling(max_tokens=3, seed=0))
        assert await _decode(stream, 3) == expected


async def test_two_plans_ahead(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        worker.gate.hold()
        stream.plan(make_plan(1, new=[make_sequence(max_tokens=1)], scheduled=[(1, 0, 2)]))
        stream.plan(make_plan(2, scheduled=[(1, 2, 1)]))
        worker.gate.open()
        first, second = await stream.result(), await stream.result()
    assert first.outputs[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert list(second.skipped_sequence_ids) == [1]
    assert not second.outputs


async def test_release_without_a_plan_frees_units(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        await _decode(stream, 1)
        stream.release(1, 99)
        stream.plan(make_plan(2))
        assert (await stream.result()).num_free_units == worker.engine.model.num_units


async def test_join_token_is_sent_as_bearer(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, join_token="secret", wait=False):
        stream = await gateway.accept()
        assert stream.metadata["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "status", [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL]
)
async def test_attaches_again_with_a_clean_engine(
    gateway: FakeGateway, status: grpc.StatusCode | None
) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        tokens = await _decode(stream, 2)
        stream.end(status)
        stream = await gateway.accept()
        assert worker.engine.num_sequences == 0
        assert await _decode(stream, 2) == tokens


async def test_waits_for_a_scheduler_that_is_not_there_yet() -> None:
    async with fake_gateway() as gateway:
        address = gateway.address
    async with FakeWorker(address, wait=False) as worker:
        async with fake_gateway(int(address.rpartition(":")[2])) as gateway:
            await gateway.accept()
            await worker.wait_attached()
        async with fake_gateway(int(address.rpartition(":")[2])) as gateway:
            await gateway.accept()
            await worker.wait_attached(num_attachments=2)


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INVALID_ARGUMENT,
    ],
)
async def test_permanent_refusal_ends_the_session(
    gateway: FakeGateway, status: grpc.StatusCode
) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        await gateway.refuse(status)
        with pytest.raises(RefusedError, match=rf"^the scheduler refused .*{status.name}: as scr"):
            await worker.join()


async def test_refusal_before_register_was_read_ends_the_session(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        refusing = asyncio.create_task(
            gateway.refuse_all_unread(grpc.StatusCode.FAILED_PRECONDITION)
        )
        with pytest.raises(RefusedError):
            await worker.join()
        refusing.cancel()


async def test_silent_scheduler_is_dialled_again(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aptserve_worker.attachment.REGISTER_TIMEOUT_SECONDS", 0.05)
    async with FakeWorker(gateway.address, wait=False):
        silent = await gateway.accept(register=False)
        await silent.wait_ended()
        await gateway.accept(register=False)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(make_plan(2), id="plan id skipped"),
        pytest.param(make_plan(1, scheduled=[(5, 0, 1)]), id="unknown sequence"),
        pytest.param(
            make_plan(1, new=[worker_pb2.NewSequence(sequence_id=1)]), id="incomplete sequence"
        ),
    ],
)
async def test_wrong_plan_breaks_the_stream(
    gateway: FakeGateway, plan: worker_pb2.BatchPlan
) -> None:
    async with FakeWorker(gateway.address, wait=False):
        stream = await gateway.accept()
        stream.plan(plan)
        await stream.wait_ended()
        await _decode(await gateway.accept(), 1)


async def test_second_registered_breaks_the_stream(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False):
        stream = await gateway.accept()
        stream.registered()
        await stream.wait_ended()
        await gateway.accept()


async def test_plan_before_registered_breaks_the_stream(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False):
        stream = await gateway.accept(register=False)
        stream.plan(make_plan(1))
        await stream.wait_ended()
        await gateway.accept()


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.OUT_OF_MEMORY, FaultKind.PLAN_ERROR])
async def test_engine_failure_resets_and_attaches_again(
    gateway: FakeGateway, kind: FaultKind
) -> None:
    async with FakeWorker(gateway.address, faults=[Fault(2, kind)], wait=False) as worker:
        stream = await gateway.accept()
        tokens = await _decode(stream, 1)
        stream.plan(make_plan(2, scheduled=[(1, 2, 1)]))
        await stream.wait_ended()
        stream = await gateway.accept()
        assert worker.engine.num_resets == 1
        assert (await _decode(stream, 2))[:1] == tokens


async def test_repeated_engine_failures_end_the_worker(gateway: FakeGateway) -> None:
    faults = [Fault(step, FaultKind.ERROR) for step in (1, 2, 3)]
    async with FakeWorker(gateway.address, faults=faults, wait=False) as worker:
        for _ in range(3):
            (await gateway.accept()).plan(make_plan(1))
        with pytest.raises(WorkerBrokenError, match=r"3 engine failures .*step 3"):
            await worker.join()


async def test_good_step_forgives_engine_failures(gateway: FakeGateway) -> None:
    faults = [Fault(step, FaultKind.ERROR) for step in (1, 2, 4, 5)]
    async with FakeWorker(gateway.address, faults=faults, wait=False):
        for num_good in (0, 0, 1, 0):
            stream = await gateway.accept()
            for plan_id in range(1, num_good + 1):
                stream.plan(make_plan(plan_id))
                await stream.result()
            stream.plan(make_plan(num_good + 1))
            await stream.wait_ended()
        await _decode(await gateway.accept(), 1)


async def test_wire_faults_spoil_the_reply(gateway: FakeGateway) -> None:
    faults = [
        Fault(1, FaultKind.WRONG_PLAN_ID),
        Fault(2, FaultKind.DUPLICATE_REPLY),
        Fault(3, FaultKind.DROP_STREAM),
    ]
    async with FakeWorker(gateway.address, faults=faults, wait=False):
        stream = await gateway.accept()
        for plan_id in (1, 2):
            stream.plan(make_plan(plan_id))
        assert [(await stream.result()).plan_id for _ in range(3)] == [1_000_001, 2, 2]
        stream.plan(make_plan(3))
        await stream.wait_ended()
        await gateway.accept()


async def test_leaves_in_good_order(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        await _decode(stream, 1)
        leaving = asyncio.create_task(worker.leave())
        assert (await stream.receive()).WhichOneof("message") == "leaving"
        stream.plan(make_plan(2, scheduled=[(1, 2, 1)]))
        assert (await stream.result()).plan_id == 2
        assert not leaving.done()
        stream.detached()
        await leaving
        await stream.wait_ended()


async def test_leaves_without_detached_after_the_limit(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, leave_timeout_seconds=0.05, wait=False) as worker:
        stream = await gateway.accept()
        await worker.wait_attached()
        await worker.leave()
        await stream.wait_ended()


async def test_leaves_at_once_when_not_attached(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        await gateway.accept(register=False)
        await worker.leave(timeout_seconds=2)


async def test_leaves_when_the_stream_breaks_meanwhile(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        await worker.wait_attached()
        leaving = asyncio.create_task(worker.leave())
        assert (await stream.receive()).WhichOneof("message") == "leaving"
        stream.end(grpc.StatusCode.UNAVAILABLE)
        await leaving


async def test_detached_worker_that_stays_attaches_again(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False):
        (await gateway.accept()).detached()
        await gateway.accept()


async def test_killed_worker_drops_the_stream(gateway: FakeGateway) -> None:
    async with FakeWorker(gateway.address, wait=False) as worker:
        stream = await gateway.accept()
        worker.gate.hold()
        stream.plan(make_plan(1, new=[make_sequence()], scheduled=[(1, 0, 2)]))
        await worker.kill()
        await stream.wait_ended()


async def test_entering_fails_when_the_scheduler_refuses(gateway: FakeGateway) -> None:
    refusing = asyncio.create_task(gateway.refuse(grpc.StatusCode.UNAUTHENTICATED))
    with pytest.raises(RefusedError):
        async with FakeWorker(gateway.address):
            pass
    await refusing


def test_silent_scheduler_is_noticed_within_10_s() -> None:
    options = dict(session.CHANNEL_OPTIONS)
    for timeout in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        assert options["grpc.keepalive_time_ms"] + options[timeout] < 10_000


def test_backoff_doubles_to_its_most_with_jitter() -> None:
    backoff = Backoff()
    delays = [backoff.next_seconds() for _ in range(5000)]
    assert 0.05 <= delays[0] <= 0.1
    assert 0.1 <= delays[1] <= 0.2
    assert all(2.5 <= delay <= 5.0 for delay in delays[6:])
    assert len(set(delays[6:])) > 1000
    backoff.reset()
    assert backoff.next_seconds() <= 0.1


@pytest.mark.parametrize(("lasting_seconds", "is_reset"), [(60.0, False), (-1.0, True)])
async def test_backoff_grows_while_attaching_brings_nothing(
    gateway: FakeGateway,
    monkeypatch: pytest.MonkeyPatch,
    lasting_seconds: float,
    is_reset: bool,
) -> None:
    backoff = Backoff(0.001, 0.01)
    monkeypatch.setattr(session, "Backoff", lambda: backoff)
    monkeypatch.setattr(session, "LASTING_SECONDS", lasting_seconds)
    async with FakeWorker(gateway.address, wait=False) as worker:
        for _ in range(8):
            stream = await gateway.accept()
            await worker.wait_attached()
            stream.end(grpc.StatusCode.INTERNAL)
            await stream.wait_ended()
        await gateway.accept()
    assert (backoff.next_seconds() < 0.005) == is_reset
