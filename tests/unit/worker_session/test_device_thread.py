from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from aptserve_worker.device_thread import DeviceThread, Failed, Lane, Outcome, Step
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


class _Recorder:
    """An engine that writes down what it is asked, and on which thread."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.threads = {threading.current_thread()}
        self.on_execute: Callable[[BatchPlan], StepOutput] = lambda plan: StepOutput(())

    @property
    def info(self) -> EngineInfo:
        return FakeModel().info()

    def execute(self, plan: BatchPlan) -> StepOutput:
        self._note(plan.plan_id)
        return self.on_execute(plan)

    def release(self, sequence_ids: Sequence[int]) -> None:
        self._note(("release", *sequence_ids))

    def reset(self) -> None:
        self._note("reset")

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
