"""The driver with a real core and workers made of lists."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from aptserve.errors import (
    AptServeError,
    InternalError,
    InvalidArgumentError,
    ProtocolError,
    UnavailableError,
)
from aptserve_scheduler.core import (
    BatchPlan,
    CostCoefficients,
    Objectives,
    PlanId,
    PolicyError,
    RequestId,
    RequestSpec,
    Scheduler,
    SchedulerConfig,
    SequenceId,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.driver import Driver
from aptserve_scheduler.feed import PlanFeed
from aptserve_scheduler.metrics import Metrics
from aptserve_scheduler.policies.registry import create_policy
from aptserve_scheduler.stream import MAX_UNSENT_TOKENS, Chunk, RequestStream, SlowReaderError
from support.eventually import eventually


@dataclass
class ListPort:
    """Keeps what a worker would be sent."""

    device: str = "list"
    unit_bytes: int = 1
    resident_bytes: int = 1
    plans: list[BatchPlan] = field(default_factory=list)
    releases: list[SequenceId] = field(default_factory=list)
    is_detached: bool = False
    error: AptServeError | None = None

    def send_plan(self, plan: BatchPlan) -> None:
        self.plans.append(plan)

    def send_release(self, sequence_ids: Sequence[SequenceId]) -> None:
        self.releases.extend(sequence_ids)

    def send_detached(self) -> None:
        self.is_detached = True

    def cut(self, error: AptServeError) -> None:
        self.error = error


class Rig:
    """A driver whose clock stands still."""

    def __init__(self, **config: int) -> None:
        self.core = Scheduler(SchedulerConfig(**config), create_policy("fcfs"))
        self.feed = PlanFeed()
        self.driver = Driver(self.core, Metrics(), self.feed, clock=lambda: 100.0)

    def attach(self, name: str = "w", num_units: int = 1000) -> ListPort:
        port = ListPort()
        spec = WorkerSpec(
            worker_id=WorkerId(name),
            num_units=num_units,
            block_size=16,
            tiers=(TierSpec(Tier.KV, 2),),
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            cost=CostCoefficients(1e-3, 1e-6, 1e-6, 1e-9),
        )
        self.driver.attach(spec, port)
        return port

    def submit(self, name: str, max_tokens: int = 4) -> RequestStream:
        spec = RequestSpec(RequestId(name), (1, 2, 3), max_tokens, Objectives(1.0, 1.0))
        stream = RequestStream(spec.request_id, num_prompt_tokens=3, arrival=99.0)
        self.driver.submit(spec, stream)
        return stream

    def answer(self, plan: BatchPlan, token_ids: Sequence[int] = (7,)) -> None:
        outputs = tuple(SequenceOutput(s.sequence_id, token_ids) for s in plan.scheduled)
        worker = self.driver.workers[plan.worker_id]
        self.driver.apply(worker, StepResult(plan.plan_id, outputs, 0.001))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.driver.close()


async def turn() -> None:
    """Let the loop do what is due now."""
    await asyncio.sleep(0)


async def test_requests_of_one_turn_are_planned_together(rig: Rig) -> None:
    port = rig.attach()
    rig.submit("a")
    rig.submit("b")
    assert port.plans == []
    await turn()
    assert [len(plan.scheduled) for plan in port.plans] == [2, 2]


async def test_the_next_plan_goes_out_before_the_text_is_made(rig: Rig) -> None:
    port = rig.attach()
    stream = rig.submit("a")
    await turn()
    rig.answer(port.plans[0])
    assert len(port.plans) == 3
    assert stream.num_output_tokens == 0
    await eventually(lambda: stream.num_output_tokens == 1)


async def test_the_worker_with_most_room_is_asked_first(rig: Rig) -> None:
    first, second = rig.attach("first"), rig.attach("second")
    rig.submit("a", max_tokens=40)
    await turn()
    rig.submit("b", max_tokens=40)
    await turn()
    assert len(first.plans) == 2
    assert len(second.plans) == 2


async def test_an_ended_request_is_released_while_the_worker_is_idle(rig: Rig) -> None:
    port = rig.attach()
    rig.submit("a", max_tokens=1)
    await turn()
    [plan] = port.plans
    rig.answer(plan)
    assert port.releases == [plan.scheduled[0].sequence_id]
    assert rig.core.snapshot(100.0).workers[0].num_used_units == 0


async def test_a_reader_that_left_frees_the_memory_at_once(rig: Rig) -> None:
    rig.attach()
    stream = rig.submit("a")
    await turn()
    rig.driver.leave(stream)
    assert rig.driver.num_pending == 0
    assert rig.core.snapshot(100.0).workers[0].num_used_units == 0
    rig.driver.leave(stream)


async def test_a_reader_that_left_does_not_end_a_namesake(rig: Rig) -> None:
    rig.attach()
    first = rig.submit("a")
    rig.driver.abort(first.request_id)
    second = rig.submit("a")
    rig.driver.leave(first)
    assert rig.driver.num_pending == 1
    assert not second.is_closed


async def test_a_reader_that_reads_nothing_is_cut(rig: Rig) -> None:
    port = rig.attach(num_units=10_000)
    stream = rig.submit("a", max_tokens=3 * MAX_UNSENT_TOKENS)
    await turn()
    rig.answer(port.plans[0], [7] * (MAX_UNSENT_TOKENS + 1))
    assert rig.driver.num_pending == 1
    await eventually(lambda: rig.driver.num_pending == 0)
    with pytest.raises(SlowReaderError):
        await stream.next()


async def test_unsent_tokens_come_in_one_chunk(rig: Rig) -> None:
    port = rig.attach()
    stream = rig.submit("a")
    await turn()
    rig.answer(port.plans[0], [5])
    rig.answer(port.plans[1], [6])
    await eventually(lambda: stream.num_output_tokens == 2)
    assert await stream.next() == Chunk([5, 6])


async def test_a_fault_of_the_policy_costs_the_stream_of_the_worker(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = rig.attach()

    def broken(worker_id: WorkerId, now: float) -> BatchPlan | None:
        raise PolicyError("unsound")

    monkeypatch.setattr(rig.core, "plan", broken)
    stream = rig.submit("a")
    await turn()
    assert isinstance(port.error, InternalError)
    assert "unsound" not in port.error.message
    assert not rig.driver.workers
    assert not stream.is_closed
    rig.core.check_integrity()


async def test_a_fault_that_stays_gives_the_requests_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(worker_id: WorkerId, now: float) -> BatchPlan | None:
        raise PolicyError("unsound")

    monkeypatch.setattr(rig.core, "plan", broken)
    stream = rig.submit("a")
    for _ in range(3):
        assert not stream.is_closed
        rig.attach()
        await turn()
    with pytest.raises(InternalError):
        await stream.next()


async def test_a_wrong_answer_is_a_protocol_error(rig: Rig) -> None:
    rig.attach()
    rig.submit("a")
    await turn()
    worker = rig.driver.workers[WorkerId("w")]
    with pytest.raises(ProtocolError):
        rig.driver.apply(worker, StepResult(PlanId(9), (), 0.0))


async def test_a_worker_that_leaves_goes_when_its_last_plan_has_returned(rig: Rig) -> None:
    port = rig.attach()
    stream = rig.submit("a")
    await turn()
    rig.driver.drain_worker(rig.driver.workers[WorkerId("w")])
    rig.answer(port.plans[0])
    assert not port.is_detached
    rig.answer(port.plans[1])
    assert port.is_detached
    assert len(port.plans) == 2
    assert not rig.driver.workers
    assert not stream.is_closed
    other = rig.attach("other")
    await turn()
    assert list(other.plans[0].new[0].token_ids) == [1, 2, 3, 7, 7]


async def test_answers_of_a_detached_worker_are_ignored(rig: Rig) -> None:
    port = rig.attach()
    rig.submit("a")
    await turn()
    worker = rig.driver.workers[WorkerId("w")]
    rig.driver.detach(worker)
    rig.driver.detach(worker)
    outputs = (SequenceOutput(port.plans[0].scheduled[0].sequence_id, (7,)),)
    rig.driver.apply(worker, StepResult(PlanId(1), outputs, 0.001))


async def test_what_no_worker_left_can_hold_fails(rig: Rig) -> None:
    big, _ = rig.attach("big"), rig.attach("small", num_units=8)
    stream = rig.submit("a", max_tokens=200)
    await turn()
    assert big.plans
    rig.driver.detach(rig.driver.workers[WorkerId("big")])
    with pytest.raises(UnavailableError, match="tokens"):
        await stream.next()
    with pytest.raises(InvalidArgumentError) as caught:
        rig.submit("b", max_tokens=200)
    assert caught.value.field == "sampling.max_tokens"


async def test_all_requests_can_be_failed(rig: Rig) -> None:
    rig.attach()
    streams = [rig.submit(name) for name in "abc"]
    rig.driver.fail_all(UnavailableError("stopping"))
    for stream in streams:
        with pytest.raises(UnavailableError, match="stopping"):
            await stream.next()
    assert await rig.driver.wait_no_requests(1.0) == 0


async def test_waiting_for_the_end_has_a_limit(rig: Rig) -> None:
    rig.submit("a")
    assert await rig.driver.wait_no_requests(0.01) == 1


async def test_watchers_see_plans_and_how_many_they_missed(rig: Rig) -> None:
    port = rig.attach()
    with rig.feed.reader() as reader, rig.feed.reader(WorkerId("other")) as other:
        rig.submit("a", max_tokens=400)
        await turn()
        while len(port.plans) < 300:
            rig.answer(port.plans[len(port.plans) - 2])
        read = await reader.next()
        assert read is not None
        sent, num_dropped = read
        assert num_dropped == len(port.plans) - 256
        assert sent.plan.plan_id == num_dropped + 1
        following = await reader.next()
        assert following is not None
        assert following[1] == 0
        rig.feed.close()
        assert await other.next() is None
