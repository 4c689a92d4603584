"""The one thread that owns the engine.

Everything an engine does (build, launch, collect, release, reset) happens on this thread, in the
order it was asked for. The event loop puts work into a queue and gets outcomes back through
``call_soon_threadsafe``; between a plan's arrival and its start lie one queue hand-over and no
translation, because plans arrive here as plain values.

Where the engine overlaps steps, a plan is launched as soon as it comes, also while the step before
runs. A second thread waits for the device and reports in the same queue that a step is done, so
this thread is always ready for the next plan.

Work belongs to a :class:`Lane`, one per stream to the scheduler. A dropped lane runs nothing more
of what it has in the queue, and a reset clears the engine for the next one, so a plan of a lost
stream never runs on a new one's state.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

from aptserve_worker.plan import (
    MAX_LAUNCHED,
    BatchPlan,
    Engine,
    EngineInfo,
    Launched,
    StepOutput,
)

RESET_TIMEOUT_SECONDS = 600.0
"""A reset waits for the step under way; a long prefill of a large model on a CPU takes minutes."""


class DeviceStuckError(Exception):
    """The engine did not come back from a step or a reset; only a new process helps."""


@dataclass(frozen=True, slots=True)
class Step:
    """A plan that ran. Its times are explained at :class:`_StepClock`."""

    plan_id: int
    output: StepOutput
    step_seconds: float
    gap_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Work that raised; nothing of its lane runs after it. ``plan_id`` is None for a release."""

    plan_id: int | None
    error: Exception


Outcome = Step | Failed


class Lane:
    """Work of one stream; its outcomes come in order on the event loop that opened it."""

    def __init__(self, device: DeviceThread, on_outcome: Callable[[Outcome], None]) -> None:
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._on_outcome = on_outcome
        self._dropped = False

    def submit(self, plan: BatchPlan) -> None:
        """Run a plan after all work given before."""
        queued_at = perf_counter()
        self._device.put(lambda pipeline: pipeline.launch(self, plan, queued_at))

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences after all work given before."""
        self._device.put(lambda pipeline: pipeline.release(self, sequence_ids))

    def drop(self) -> None:
        """Run nothing more of this lane; steps under way go on and their outcomes are lost."""
        self._dropped = True

    @property
    def is_dropped(self) -> bool:
        """Whether nothing more of it is to run."""
        return self._dropped

    async def reset(self) -> None:
        """Drop the lane and reset the engine once the steps under way have ended.

        Raises what the engine's reset raises, and :class:`DeviceStuckError` after
        ``RESET_TIMEOUT_SECONDS``.
        """
        self.drop()
        done: Future[None] = Future()
        self._device.put(lambda pipeline: pipeline.reset(done))
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), RESET_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise DeviceStuckError(
                f"the step under way did not end within {RESET_TIMEOUT_SECONDS:.0f} s"
            ) from error

    def fail(self, plan_id: int | None, error: Exception) -> None:
        """Drop the lane and report why; only the first failure is reported."""
        if not self._dropped:
            self.drop()
            self.post(Failed(plan_id, error))

    def post(self, outcome: Outcome) -> None:
        """Hand an outcome to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._on_outcome, outcome)
        except RuntimeError:
            # The loop has closed: the process is leaving and nobody wants the outcome.
            self.drop()


class DeviceThread:
    """Builds an engine on its own thread and runs work on it in order."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._built: Future[EngineInfo] = Future()
        # Daemon: a step that never ends must not keep the process from leaving.
        self._thread = threading.Thread(target=self._run, name="aptserve-device", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; after :meth:`close` only if it is stuck in the engine."""
        return self._thread.is_alive()

    async def start(self) -> EngineInfo:
        """Build the engine; raises what the builder raises. Takes as long as loading takes."""
        self._thread.start()
        return await asyncio.wrap_future(self._built)

    def open_lane(self, on_outcome: Callable[[Outcome], None]) -> Lane:
        """A lane for a new stream; the lane before must have been reset."""
        return Lane(self, on_outcome)

    def put(self, work: _Work) -> None:
        """Run ``work`` on the thread after all work given before; for lanes."""
        self._work.put(work)

    async def close(self, timeout_seconds: float = 5.0) -> bool:
        """Stop after the work under way; whether the thread ended in time. May be called twice."""
        if not self._thread.is_alive():
            return True
        self._work.put(None)
        await asyncio.to_thread(self._thread.join, timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if not self._built.set_running_or_notify_cancel():
            return
        try:
            engine = self._build()
            info = engine.info
        except BaseException as error:  # SystemExit too: whoever waits for the engine must learn it
            self._built.set_exception(error)
            return
        self._built.set_result(info)
        pipeline = _Pipeline(engine, self._work)
        while (work := self._work.get()) is not None:
            work(pipeline)
        pipeline.close()


@dataclass(slots=True, eq=False)
class _Begun:
    """A step under way."""

    lane: Lane
    plan: BatchPlan
    start: float
    gap_seconds: float
    launched: Launched
    end: float | None = None
    """When it was done, once that is known."""


class _Pipeline:
    """The engine and the steps that it has launched, oldest first; on the device's thread only."""

    def __init__(self, engine: Engine, work: queue.SimpleQueue[_Work | None]) -> None:
        self._engine = engine
        self._clock = _StepClock()
        self._begun: deque[_Begun] = deque()
        self._watch = _Watch(work) if engine.overlaps else None

    def launch(self, lane: Lane, plan: BatchPlan, queued_at: float) -> None:
        """Launch a plan, and collect it at once where the engine does not overlap steps."""
        while len(self._begun) >= MAX_LAUNCHED:
            self._collect_oldest()
        if lane.is_dropped:
            return
        start = perf_counter()
        gap_seconds = self._clock.gap(start, queued_at, is_busy=bool(self._begun))
        try:
            launched = self._engine.launch(plan)
        except Exception as error:
            self._collect_all()
            lane.fail(plan.plan_id, error)
            return
        self._clock.launched(plan)
        begun = _Begun(lane, plan, start, gap_seconds, launched)
        self._begun.append(begun)
        if self._watch is None:
            self._collect_oldest()
        else:
            self._watch.put(begun)

    def collect(self, begun: _Begun) -> None:
        """The device has done a step; it may have been collected already, or given up."""
        if begun in self._begun:
            self._collect_oldest()

    def release(self, lane: Lane, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; steps under way do not mind."""
        if lane.is_dropped:
            return
        try:
            self._engine.release(sequence_ids)
        except Exception as error:
            self._collect_all()
            lane.fail(None, error)
        else:
            self._clock.released(sequence_ids)

    def reset(self, done: Future[None]) -> None:
        """Forget everything, after the steps under way."""
        if not done.set_running_or_notify_cancel():
            return
        self._collect_all()
        try:
            self._engine.reset()
            self._clock.reset()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def close(self) -> None:
        """End the steps under way, and watch no more."""
        self._collect_all()
        if self._watch is not None:
            self._watch.close()

    def _collect_all(self) -> None:
        while self._begun:
            self._collect_oldest()

    def _collect_oldest(self) -> None:
        begun = self._begun.popleft()
        try:
            output = self._engine.collect()
        except Exception as error:
            # What was launched after it has nothing to stand on; a reset must follow.
            self._begun.clear()
            begun.lane.fail(begun.plan.plan_id, error)
            return
        end = perf_counter() if begun.end is None else begun.end
        step_seconds = self._clock.collected(output, begun.start, end)
        begun.lane.post(Step(begun.plan.plan_id, output, step_seconds, begun.gap_seconds))


class _Watch:
    """A thread that waits for steps in the order launched, and puts their collection in a queue."""

    def __init__(self, work: queue.SimpleQueue[_Work | None]) -> None:
        self._work = work
        self._steps: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="aptserve-device-watch", daemon=True).start()

    def put(self, begun: _Begun) -> None:
        """Watch a step after those given before."""
        self._steps.put(begun)

    def close(self) -> None:
        """End after the steps given."""
        self._steps.put(None)

    def _run(self) -> None:
        while (begun := self._steps.get()) is not None:
            with suppress(Exception):  # collecting it raises the same, where it can be reported
                begun.launched.wait()
            begun.end = perf_counter()
            self._report(begun)

    def _report(self, begun: _Begun) -> None:
        self._work.put(lambda pipeline: pipeline.collect(begun))


class _StepClock:
    """Measures how long the device takes for a step, and the time before it without any.

    A step begins when it is launched, or at the end of the step before where that comes later, and
    ends when the device has done it. The gap before it runs from the end of the step before it, and
    is 0 if that was still under way. It counts when the device was wanted all that time: a sequence
    lived on the worker (known, not ended, not released), or the plan was in the queue before the
    last step ended. Otherwise the worker was idle and the gap is 0.
    """

    def __init__(self) -> None:
        self._live: set[int] = set()
        self._last_end: float | None = None

    def gap(self, start: float, queued_at: float, *, is_busy: bool) -> float:
        """Seconds before a step that starts now; ``is_busy``: another one is under way."""
        if is_busy or self._last_end is None:
            return 0.0
        if not (self._live or queued_at <= self._last_end):
            return 0.0
        return start - self._last_end

    def launched(self, plan: BatchPlan) -> None:
        self._live.difference_update(plan.release)
        self._live.update(n.sequence_id for n in plan.new)

    def collected(self, output: StepOutput, start: float, end: float) -> float:
        """Seconds that the step took."""
        if self._last_end is not None:
            start = max(start, self._last_end)
        self._last_end = end
        self._live.difference_update(
            o.sequence_id for o in output.outputs if o.finish_reason is not None
        )
        self._live.difference_update(sequence_id for sequence_id, _ in output.failures)
        return end - start

    def released(self, sequence_ids: Sequence[int]) -> None:
        self._live.difference_update(sequence_ids)

    def reset(self) -> None:
        self._live.clear()
        self._last_end = None


_Work = Callable[[_Pipeline], None]
