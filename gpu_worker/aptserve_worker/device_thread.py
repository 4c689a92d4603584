"""The one thread that owns the engine.

Everything an engine does (build, execute, release, reset) happens on this thread, in the order it
was asked for. The event loop puts work into a queue and gets outcomes back through
``call_soon_threadsafe``; between a plan's arrival and its start lie one queue hand-over and no
translation, because plans arrive here as plain values.

Work belongs to a :class:`Lane`, one per stream to the scheduler. A dropped lane runs nothing more
of what it has in the queue, and a reset clears the engine for the next one, so a plan of a lost
stream never runs on a new one's state.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

from aptserve_worker.plan import BatchPlan, Engine, EngineInfo, StepOutput

RESET_TIMEOUT_SECONDS = 600.0
"""A reset waits for the step under way; a long prefill of a large model on a CPU takes minutes."""


class DeviceStuckError(Exception):
    """The engine did not come back from a step or a reset; only a new process helps."""


@dataclass(frozen=True, slots=True)
class Step:
    """A plan that ran. ``gap_seconds`` is explained at :class:`_StepClock`."""

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
        self._device.put(lambda engine, clock: self._execute(engine, clock, plan, queued_at))

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences after all work given before."""
        self._device.put(lambda engine, clock: self._release(engine, clock, sequence_ids))

    def drop(self) -> None:
        """Run nothing more of this lane; a step under way goes on and its outcome is lost."""
        self._dropped = True

    async def reset(self) -> None:
        """Drop the lane and reset the engine once the step under way has ended.

        Raises what the engine's reset raises, and :class:`DeviceStuckError` after
        ``RESET_TIMEOUT_SECONDS``.
        """
        self.drop()
        done: Future[None] = Future()
        self._device.put(lambda engine, clock: _reset(engine, clock, done))
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), RESET_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise DeviceStuckError(
                f"the step under way did not end within {RESET_TIMEOUT_SECONDS:.0f} s"
            ) from error

    def _execute(
        self, engine: Engine, clock: _StepClock, plan: BatchPlan, queued_at: float
    ) -> None:
        if self._dropped:
            return
        start = perf_counter()
        gap_seconds = clock.gap(start, queued_at)
        try:
            output = engine.execute(plan)
        except Exception as error:
            self._fail(plan.plan_id, error)
            return
        end = perf_counter()
        clock.stepped(plan, output, end)
        self._post(Step(plan.plan_id, output, end - start, gap_seconds))

    def _release(self, engine: Engine, clock: _StepClock, sequence_ids: Sequence[int]) -> None:
        if self._dropped:
            return
        try:
            engine.release(sequence_ids)
        except Exception as error:
            self._fail(None, error)
        else:
            clock.released(sequence_ids)

    def _fail(self, plan_id: int | None, error: Exception) -> None:
        self.drop()
        self._post(Failed(plan_id, error))

    def _post(self, outcome: Outcome) -> None:
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
        clock = _StepClock()
        while (work := self._work.get()) is not None:
            work(engine, clock)


class _StepClock:
    """Measures the time between steps in which the device should have worked.

    The gap before a step runs from the end of the step before it. It counts when the device was
    wanted all that time: a sequence lived on the worker (known, not ended, not released), or the
    plan was in the queue before the last step ended. Otherwise the worker was idle and the gap
    is 0.
    """

    def __init__(self) -> None:
        self._live: set[int] = set()
        self._last_end: float | None = None

    def gap(self, start: float, queued_at: float) -> float:
        if self._last_end is None or not (self._live or queued_at <= self._last_end):
            return 0.0
        return start - self._last_end

    def stepped(self, plan: BatchPlan, output: StepOutput, end: float) -> None:
        self._last_end = end
        self._live.difference_update(plan.release)
        self._live.update(n.sequence_id for n in plan.new)
        self._live.difference_update(
            o.sequence_id for o in output.outputs if o.finish_reason is not None
        )
        self._live.difference_update(sequence_id for sequence_id, _ in output.failures)

    def released(self, sequence_ids: Sequence[int]) -> None:
        self._live.difference_update(sequence_ids)

    def reset(self) -> None:
        self._live.clear()
        self._last_end = None


_Work = Callable[[Engine, _StepClock], None]


def _reset(engine: Engine, clock: _StepClock, done: Future[None]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        engine.reset()
        clock.reset()
    except Exception as error:
        done.set_exception(error)
    else:
        done.set_result(None)
