from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from aptserve_worker.device_thread import (
    DeviceThread,
    Failed,
    Lane,
    Outcome,
    Step,
    _StepClock,
)
from aptserve_worker.fake import FakeModel
from aptserve_worker.plan import (
    BatchPlan,
    EngineInfo,
    FinishReason,
    NewSequence,
    Sampling,
    SequenceOutput,
    StepOutput,
    Tier,
)


@dataclass
class _UnderWay:
    """A launched step that is done when a test says so."""

    plan_id: int
    output: StepOutput
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        assert self.done.wait(5)


class _Recorder:
    """An engine that writes down what it is asked, and on which thread."""

    def __init__(self, *, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self.calls: list[object] = []
        self.threads = {threading.current_thread()}
        self.on_execute: Callable[[BatchPlan], StepOutput] = lambda plan: StepOutput(())
        self.on_collect: Callable[[int], None] = lambda plan_id: None
        self.begun: dict[int, threading.Event] = defaultdict(threading.Event)
        self.steps: dict[int, _UnderWay] = {}
        self._launched: deque[_UnderWay] = deque()

    @property
    def info(self) -> EngineInfo:
        return FakeModel().info()

    def launch(self, plan: BatchPlan) -> _UnderWay:
        self._note(plan.plan_id)
        step = _UnderWay(plan.plan_id, self.on_execute(plan))
        if not self.overlaps:
            step.done.set()
        self._launched.append(step)
        self.steps[plan.plan_id] = step
        self.begun[plan.plan_id].set()
        return step

    def collect(self) -> StepOutput:
        step = self._launched.popleft()
        if self.overlaps:
            self._note(("collect", step.plan_id))
        step.wait()
        self.on_collect(step.plan_id)
        return step.output

    def release(self, sequence_ids: Sequence[int]) -> None:
        self._note(("release", *sequence_ids))

    def reset(self) -> None:
        self._launched.clear()
        self._note("reset")

    async def has_begun(self, plan_id: int) -> None:
        assert await asyncio.to_thread(self.begun[plan_id].wait, 5)

    def _note(self, call: object) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread())


@pytest.fixture
async def device() -> AsyncIterator[tuple[DeviceThread, list[_Recorder]]]:
    engines: list[_Recorder] = []

    def build() -> _Recorder:
        engines.append(_Recorder())
        return engines[0]

    device = DeviceThread(build)
    yield device, engines
    assert await device.close()


@pytest.fixture
async def overlapping() -> AsyncIterator[tuple[DeviceThread, _Recorder]]:
    engine = _Recorder(overlaps=True)
    device = DeviceThread(lambda: engine)
    yield device, engine
    for step in engine.steps.values():
        step.done.set()
    assert await device.close()


def make_new(sequence_id: int) -> NewSequence:
    return NewSequence(sequence_id, "r", (1,), 1, Tier.KV, Sampling(max_tokens=9, seed=0))


class _Outcomes:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Outcome] = asyncio.Queue()
        self.take = self._queue.put_nowait

    async def next(self) -> Outcome:
        return await asyncio.wait_for(self._queue.get(), 5)

    async def step(self) -> Step:
        outcome = await self.next()
        assert isinstance(outcome, Step)
        return outcome

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()


_Device = tuple[DeviceThread, list[_Recorder]]
_Overlapping = tuple[DeviceThread, _Recorder]


async def _open(device: DeviceThread) -> tuple[Lane, _Outcomes]:
    await device.start()
    outcomes = _Outcomes()
    return device.open_lane(outcomes.take), outcomes


async def test_everything_happens_in_order_on_one_other_thread(device: _Device) -> None:
    thread, engines = device
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1))
    lane.release((7, 8))
    lane.submit(BatchPlan(2))
    assert [(await outcomes.step()).plan_id for _ in range(2)] == [1, 2]
    await lane.reset()
    assert engines[0].calls == [1, ("release", 7, 8), 2, "reset"]
    assert len(engines[0].threads) == 1
    assert threading.current_thread() not in engines[0].threads


async def test_builder_error_is_raised_by_start() -> None:
    def build() -> _Recorder:
        raise ValueError("no such model")

    device = DeviceThread(build)
    with pytest.raises(ValueError, match="no such model"):
        await device.start()
    assert await device.close()


async def test_nothing_of_a_lane_runs_after_a_failure(device: _Device) -> None:
    thread, engines = device
    lane, outcomes = await _open(thread)

    def fail(plan: BatchPlan) -> StepOutput:
        raise RuntimeError("broken")

    engines[0].on_execute = fail
    lane.submit(BatchPlan(1))
    lane.submit(BatchPlan(2))
    outcome = await outcomes.next()
    assert isinstance(outcome, Failed)
    assert outcome.plan_id == 1
    await lane.reset()
    assert engines[0].calls == [1, "reset"]
    assert outcomes.is_empty


async def test_dropped_plans_do_not_run_on_the_next_lane(device: _Device) -> None:
    thread, engines = device
    old, old_outcomes = await _open(thread)
    begun, go_on = threading.Event(), threading.Event()

    def block(plan: BatchPlan) -> StepOutput:
        begun.set()
        assert go_on.wait(5)
        return StepOutput(())

    engines[0].on_execute = block
    old.submit(BatchPlan(1))
    old.submit(BatchPlan(2))
    assert await asyncio.to_thread(begun.wait, 5)
    reset = asyncio.create_task(old.reset())
    await asyncio.sleep(0)
    go_on.set()
    await reset
    outcomes = _Outcomes()
    new = thread.open_lane(outcomes.take)
    new.submit(BatchPlan(1))
    await outcomes.step()
    assert engines[0].calls == [1, "reset", 1]
    assert (await old_outcomes.step()).plan_id == 1


async def test_error_in_release_is_reported(device: _Device) -> None:
    thread, engines = device
    lane, outcomes = await _open(thread)

    def fail(sequence_ids: Sequence[int]) -> None:
        raise RuntimeError("broken")

    engines[0].release = fail  # type: ignore[method-assign]
    lane.release((1,))
    outcome = await outcomes.next()
    assert isinstance(outcome, Failed)
    assert outcome.plan_id is None


async def test_reset_error_is_raised(device: _Device) -> None:
    thread, engines = device
    lane, _ = await _open(thread)

    def fail() -> None:
        raise RuntimeError("broken")

    engines[0].reset = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        await lane.reset()


async def test_gap_counts_while_a_sequence_lives(device: _Device) -> None:
    thread, _ = device
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1, new=(make_new(1),)))
    assert (await outcomes.step()).gap_seconds == 0
    lane.submit(BatchPlan(2))
    step = await outcomes.step()
    assert 0 < step.gap_seconds < 5
    assert 0 < step.step_seconds < 5


@pytest.mark.parametrize("end", ["released in plan", "released", "finished", "failed"])
async def test_gap_is_zero_after_an_idle_time(device: _Device, end: str) -> None:
    thread, engines = device
    lane, outcomes = await _open(thread)
    ended = {
        "finished": StepOutput((SequenceOutput(1, (2,), FinishReason.STOP),)),
        "failed": StepOutput((), failures=((1, "why"),)),
    }
    lane.submit(BatchPlan(1, new=(make_new(1),)))
    await outcomes.step()
    engines[0].on_execute = lambda plan: ended.get(end, StepOutput(()))
    lane.submit(BatchPlan(2, release=(1,) if end == "released in plan" else ()))
    await outcomes.step()
    if end == "released":
        lane.release((1,))
    lane.submit(BatchPlan(3))
    assert (await outcomes.step()).gap_seconds == 0


async def test_gap_counts_for_a_plan_that_was_waiting(device: _Device) -> None:
    thread, engines = device
    lane, outcomes = await _open(thread)
    go_on = threading.Event()

    def block(plan: BatchPlan) -> StepOutput:
        assert go_on.wait(5)
        return StepOutput(())

    engines[0].on_execute = block
    lane.submit(BatchPlan(1))
    lane.submit(BatchPlan(2))
    go_on.set()
    await outcomes.step()
    assert (await outcomes.step()).gap_seconds > 0


async def test_close_may_be_called_twice_and_without_start() -> None:
    device = DeviceThread(_Recorder)
    assert await device.close()
    await device.start()
    assert await device.close()
    assert await device.close()
    assert not device.is_alive


async def test_a_plan_that_comes_while_a_step_runs_is_launched_at_once(
    overlapping: _Overlapping,
) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1))
    await engine.has_begun(1)
    lane.submit(BatchPlan(2))
    await engine.has_begun(2)
    assert outcomes.is_empty
    for plan_id in (1, 2):
        engine.steps[plan_id].done.set()
        assert (await outcomes.step()).plan_id == plan_id
    assert engine.calls == [1, 2, ("collect", 1), ("collect", 2)]


async def test_a_step_is_collected_without_a_plan_to_follow(overlapping: _Overlapping) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    for plan_id in (1, 2):
        lane.submit(BatchPlan(plan_id))
        await engine.has_begun(plan_id)
        engine.steps[plan_id].done.set()
        assert (await outcomes.step()).plan_id == plan_id


async def test_no_third_step_is_launched_before_the_first_is_done(
    overlapping: _Overlapping,
) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    for plan_id in (1, 2, 3):
        lane.submit(BatchPlan(plan_id))
    await engine.has_begun(2)
    engine.steps[1].done.set()
    await engine.has_begun(3)
    engine.steps[2].done.set()
    engine.steps[3].done.set()
    assert [(await outcomes.step()).plan_id for _ in range(3)] == [1, 2, 3]
    assert engine.calls.index(("collect", 1)) < engine.calls.index(3)


async def test_a_release_keeps_its_place_between_plans(overlapping: _Overlapping) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1))
    lane.release((7,))
    lane.submit(BatchPlan(2))
    await engine.has_begun(2)
    assert engine.calls == [1, ("release", 7), 2]
    engine.steps[1].done.set()
    engine.steps[2].done.set()
    assert [(await outcomes.step()).plan_id for _ in range(2)] == [1, 2]


async def test_steps_under_way_are_reported_before_a_plan_that_fails(
    overlapping: _Overlapping,
) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    failing = threading.Event()

    def run(plan: BatchPlan) -> StepOutput:
        if plan.plan_id == 2:
            failing.set()
            raise RuntimeError("broken")
        return StepOutput(())

    engine.on_execute = run
    for plan_id in (1, 2, 3):
        lane.submit(BatchPlan(plan_id))
    assert await asyncio.to_thread(failing.wait, 5)
    assert outcomes.is_empty
    engine.steps[1].done.set()
    assert (await outcomes.step()).plan_id == 1
    failed = await outcomes.next()
    assert isinstance(failed, Failed)
    assert failed.plan_id == 2
    await lane.reset()
    assert engine.calls == [1, 2, ("collect", 1), "reset"]
    assert outcomes.is_empty


async def test_nothing_is_reported_after_a_step_that_fails_under_way(
    overlapping: _Overlapping,
) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)

    def fail(plan_id: int) -> None:
        raise RuntimeError("broken")

    engine.on_collect = fail
    for plan_id in (1, 2, 3):
        lane.submit(BatchPlan(plan_id))
    await engine.has_begun(2)
    for step in engine.steps.values():
        step.done.set()
    failed = await outcomes.next()
    assert isinstance(failed, Failed)
    assert failed.plan_id == 1
    await lane.reset()
    assert engine.calls == [1, 2, ("collect", 1), "reset"]
    assert outcomes.is_empty
    engine.on_collect = lambda plan_id: None
    again = thread.open_lane(outcomes.take)
    again.submit(BatchPlan(4))
    await engine.has_begun(4)
    engine.steps[4].done.set()
    assert (await outcomes.step()).plan_id == 4


async def test_a_reset_waits_for_the_steps_under_way(overlapping: _Overlapping) -> None:
    thread, engine = overlapping
    lane, _ = await _open(thread)
    lane.submit(BatchPlan(1))
    lane.submit(BatchPlan(2))
    await engine.has_begun(2)
    lane.submit(BatchPlan(3))
    reset = asyncio.create_task(lane.reset())
    await asyncio.sleep(0)
    for plan_id in (1, 2):
        assert not reset.done()
        engine.steps[plan_id].done.set()
    await reset
    assert engine.calls == [1, 2, ("collect", 1), ("collect", 2), "reset"]


async def test_closing_ends_the_steps_under_way(overlapping: _Overlapping) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1))
    await engine.has_begun(1)
    closing = asyncio.create_task(thread.close())
    engine.steps[1].done.set()
    assert await closing
    assert (await outcomes.step()).plan_id == 1


async def test_there_is_no_gap_before_a_step_launched_ahead(overlapping: _Overlapping) -> None:
    thread, engine = overlapping
    lane, outcomes = await _open(thread)
    lane.submit(BatchPlan(1, new=(make_new(1),)))
    lane.submit(BatchPlan(2))
    await engine.has_begun(2)
    for step in engine.steps.values():
        step.done.set()
    steps = [await outcomes.step() for _ in range(2)]
    assert [step.gap_seconds for step in steps] == [0, 0]
    assert all(0 <= step.step_seconds < 5 for step in steps)
    lane.submit(BatchPlan(3))
    await engine.has_begun(3)
    engine.steps[3].done.set()
    assert 0 < (await outcomes.step()).gap_seconds < 5


def test_the_clock_gives_every_second_to_one_step_or_gap() -> None:
    clock = _StepClock()
    assert clock.gap(10.0, 9.0, is_busy=False) == 0
    clock.launched(BatchPlan(1, new=(make_new(1),)))
    # Launched at 12 while the first runs until 15, done at 18.
    assert clock.gap(12.0, 11.0, is_busy=True) == 0
    clock.launched(BatchPlan(2))
    assert clock.collected(StepOutput(()), 10.0, 15.0) == 5
    assert clock.collected(StepOutput(()), 12.0, 18.0) == 3
    # Nothing under way from 18 to 19, with a sequence that lives.
    assert clock.gap(19.0, 18.5, is_busy=False) == 1
    clock.launched(BatchPlan(3))
    assert clock.collected(StepOutput(()), 19.0, 20.0) == 1


def test_a_sequence_released_while_its_first_step_runs_is_not_waited_for() -> None:
    clock = _StepClock()
    clock.launched(BatchPlan(1, new=(make_new(1),)))
    clock.released((1,))
    assert clock.collected(StepOutput((SequenceOutput(1, (2,)),)), 0.0, 1.0) == 1
    assert clock.gap(9.0, 8.0, is_busy=False) == 0
