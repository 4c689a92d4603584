"""The event-loop side of the scheduler core.

The one place that calls the core, always on the event loop and with one monotonic clock. Plans go
out through each worker's port, tokens through the text pipeline to each request's stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import structlog
from aptserve.errors import (
    AlreadyExistsError,
    AptServeError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ProtocolError,
    ResourceExhaustedError,
    UnavailableError,
)

from aptserve_scheduler.core import (
    BatchPlan,
    DuplicateRequest,
    Event,
    FinishReason,
    ProtocolViolation,
    QueueFull,
    RequestFinished,
    RequestId,
    RequestSpec,
    RequestTooLarge,
    Scheduler,
    SchedulerSnapshot,
    StepResult,
    TokensAppended,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.delivery import INTERNAL_TEXT, Delivery, with_tokens
from aptserve_scheduler.feed import PlanFeed
from aptserve_scheduler.metrics import Metrics
from aptserve_scheduler.stream import RequestStream
from aptserve_scheduler.text.pipeline import OutputItem
from aptserve_scheduler.workers import AttachedWorker, WorkerPort

_log = structlog.stdlib.get_logger(__name__)
_MAX_PLANNING_FAULTS = 3

Clock = Callable[[], float]


class Driver:
    """Feeds the core with what happens and carries out what it decides."""

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        feed: PlanFeed,
        clock: Clock = time.monotonic,
        *,
        plan_timeout_seconds: float = 600.0,
    ) -> None:
        """``plan_timeout_seconds``: without an answer for so long a worker is cut."""
        self._plan_timeout_seconds = plan_timeout_seconds
        self._core = scheduler
        self._metrics = metrics
        self._feed = feed
        self._clock = clock
        self._delivery = Delivery(self, metrics)
        self._streams: dict[RequestId, RequestStream] = {}
        self._workers: dict[WorkerId, AttachedWorker] = {}
        self._is_pump_due = False
        self._num_planning_faults = 0
        self._no_requests = asyncio.Event()
        self._no_requests.set()
        self.last_progress = clock()
        """When a request or an answer last came in; only of interest while requests are pending."""
        self.on_workers_changed: Callable[[], None] = lambda: None

    @property
    def workers(self) -> dict[WorkerId, AttachedWorker]:
        """The attached workers; not to be changed."""
        return self._workers

    @property
    def num_pending(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._streams)

    def snapshot(self) -> SchedulerSnapshot:
        """The state of the core now."""
        return self._core.snapshot(self._clock())

    def check_integrity(self) -> None:
        """Recount the core's books; raises :class:`IntegrityError` naming the numbers."""
        self._core.check_integrity()

    async def wait_no_requests(self, timeout_seconds: float) -> int:
        """Wait until all requests have ended; how many have not when the time is over."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._no_requests.wait()
        except TimeoutError:
            pass
        return self.num_pending

    def close(self) -> None:
        """Stop the text thread. Nothing may be called after it."""
        self._delivery.close()

    # --- requests ---

    def submit(self, spec: RequestSpec, stream: RequestStream) -> None:
        """Take in a request whose answer goes to ``stream``.

        Raises :class:`AlreadyExistsError`, :class:`ResourceExhaustedError` (queue full) or
        :class:`InvalidArgumentError` (more memory than any worker has).
        """
        if spec.request_id in self._streams:
            raise AlreadyExistsError(f"request {spec.request_id} is running")
        try:
            # Tokenising counts as waiting: the time is that of the call's arrival.
            events = self._core.add_request(spec, stream.arrival)
        except DuplicateRequest as error:
            raise AlreadyExistsError(f"request {spec.request_id} is running") from error
        except QueueFull as error:
            raise ResourceExhaustedError(str(error), error.retry_after_seconds) from error
        except RequestTooLarge as error:
            raise InvalidArgumentError("sampling.max_tokens", str(error)) from error
        if not self._streams:
            self.last_progress = self._clock()
        self._streams[spec.request_id] = stream
        self._no_requests.clear()
        self._dispatch(events)
        self.pump_soon()

    def leave(self, stream: RequestStream) -> None:
        """The reader of a stream has gone: end its request if that still runs."""
        if self._is_running(stream):
            self._end(stream, FinishReason.ABORT)

    def abort(self, request_id: RequestId) -> bool:
        """End a request; its stream finishes with ABORT. False: it is not running."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._end(stream, FinishReason.ABORT)
        return True

    def fail_all(self, error: AptServeError) -> None:
        """End every request with an error."""
        for stream in list(self._streams.values()):
            self.fail(stream, error)

    def stop(self, stream: RequestStream) -> None:
        """The text of a request is over: end it if it still runs."""
        if self._is_running(stream):
            self._end(stream, FinishReason.STOP)

    def fail(
        self, stream: RequestStream, error: AptServeError, *, drop_unsent: bool = False
    ) -> None:
        """End a stream with an error, and its request if that still runs."""
        stream.fail(error, drop_unsent=drop_unsent)
        if self._is_running(stream):
            self._dispatch(self._core.fail(stream.request_id, error.message, self._clock()))
            self.pump_soon()

    def _is_running(self, stream: RequestStream) -> bool:
        return self._streams.get(stream.request_id) is stream

    def _end(self, stream: RequestStream, reason: FinishReason) -> None:
        self._dispatch(self._core.finish(stream.request_id, reason, self._clock()))
        self.pump_soon()

    # --- workers ---

    def attach(self, spec: WorkerSpec, port: WorkerPort) -> AttachedWorker:
        """Take in a worker. Raises :class:`AlreadyExistsError` if its id is attached."""
        if spec.worker_id in self._workers:
            raise AlreadyExistsError(f"worker {spec.worker_id} is attached already")
        now = self._clock()
        self._core.add_worker(spec, now)
        worker = AttachedWorker(spec, port)
        self._workers[spec.worker_id] = worker
        self.last_progress = now
        self._fail_unservable(self._core.fail_unservable(now))
        self.on_workers_changed()
        self.pump_soon()
        return worker

    def detach(self, worker: AttachedWorker) -> None:
        """The worker's stream is over, however it ended; its requests go back to the queue."""
        if not self._is_attached(worker):
            return
        if worker.alarm is not None:
            worker.alarm.cancel()
        del self._workers[worker.spec.worker_id]
        self._fail_unservable(self._core.remove_worker(worker.spec.worker_id, self._clock()))
        self.on_workers_changed()
        self.pump_soon()

    def drain_worker(self, worker: AttachedWorker) -> None:
        """The worker wants to leave: no more plans; it goes when its last plan has returned."""
        worker.is_leaving = True
        self.on_workers_changed()
        self._pump(worker)

    def apply(self, worker: AttachedWorker, result: StepResult) -> None:
        """Take in an answer and send the next plan. Raises :class:`ProtocolError`."""
        if not self._is_attached(worker):
            return  # cut a moment ago: its stream is about to end
        now = self._clock()
        try:
            events = self._core.apply(worker.spec.worker_id, result, now)
        except ProtocolViolation as error:
            raise ProtocolError(str(error)) from error
        worker.count_answer(asyncio.get_running_loop().time())
        self.last_progress = now
        self._num_planning_faults = 0
        self._pump(worker)  # the worker first, then the clients
        self._dispatch(events)
        if any(w.num_plans_in_flight == 0 for w in self._workers.values()):
            self.pump_soon()

    def pump_soon(self) -> None:
        """Offer work to every worker at the end of this turn of the loop.

        Not at once, so that requests that come together are planned together.
        """
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump_all)

    def _fail_unservable(self, events: Sequence[Event]) -> None:
        """Requests that none of the workers left can hold; another service may have one."""
        for event in events:
            if isinstance(event, RequestFinished) and event.error is not None:
                self._streams[event.request_id].fail(UnavailableError(event.error))
        self._dispatch(events)

    def _is_attached(self, worker: AttachedWorker) -> bool:
        return self._workers.get(worker.spec.worker_id) is worker

    def _pump_all(self) -> None:
        self._is_pump_due = False
        for worker in sorted(self._workers.values(), key=lambda w: w.used_share):
            self._pump(worker)

    def _pump(self, worker: AttachedWorker) -> None:
        """Fill the worker's pipeline. A fault of the core costs the worker's stream.

        Faults without an answer between them would go on as the worker dials again and again, with
        everybody waiting: then the requests are given up.
        """
        try:
            if worker.is_leaving:
                self._let_go(worker)
            else:
                self._send_plans(worker)
        except Exception:
            _log.exception("planning failed", worker_id=worker.spec.worker_id)
            worker.port.cut(InternalError(INTERNAL_TEXT))
            self.detach(worker)
            self._num_planning_faults += 1
            if self._num_planning_faults >= _MAX_PLANNING_FAULTS:
                self.fail_all(InternalError(INTERNAL_TEXT))

    def _send_plans(self, worker: AttachedWorker) -> None:
        worker_id = worker.spec.worker_id
        while True:
            started = time.perf_counter()
            plan = self._core.plan(worker_id, self._clock())
            decision_seconds = time.perf_counter() - started
            if plan is None:
                break
            worker.port.send_plan(plan)
            self._await_answer(worker, plan)
            self._metrics.observe_plan(plan, decision_seconds)
            self._feed.publish(plan, decision_seconds)
            _log.debug(
                "plan sent", worker_id=worker_id, plan_id=plan.plan_id, num=len(plan.scheduled)
            )
        if worker.num_plans_in_flight == 0:
            worker.used_share = 0.0
            sequence_ids = self._core.take_releases(worker_id)
            if sequence_ids:
                worker.port.send_release(sequence_ids)

    def _await_answer(self, worker: AttachedWorker, plan: BatchPlan) -> None:
        loop = asyncio.get_running_loop()
        worker.count_plan(plan, loop.time())
        if worker.alarm is None:
            worker.alarm = loop.call_later(self._plan_timeout_seconds, self._look_at, worker)

    def _look_at(self, worker: AttachedWorker) -> None:
        """Cut a worker that is alive but does not answer; its requests go on elsewhere."""
        worker.alarm = None
        if worker.num_plans_in_flight == 0:
            return  # the next plan sets an alarm again
        loop, limit = asyncio.get_running_loop(), self._plan_timeout_seconds
        left = worker.silent_since + limit - loop.time()
        if left > 0:
            worker.alarm = loop.call_later(left, self._look_at, worker)
            return
        _log.error("worker is silent", worker_id=worker.spec.worker_id, seconds=limit)
        worker.port.cut(DeadlineExceededError(f"no answer to a plan within {limit:g} s"))
        self.detach(worker)

    def _let_go(self, worker: AttachedWorker) -> None:
        if worker.num_plans_in_flight == 0:
            self.detach(worker)
            worker.port.send_detached()

    # --- what the core reports ---

    def _dispatch(self, events: Iterable[Event]) -> None:
        """Hand one step's events to the text pipeline, one item per request."""
        now = self._clock()
        items: dict[RequestId, OutputItem] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                raise KeyError(f"the core reported {event.request_id}, which is not running")
            item = items.get(event.request_id) or OutputItem(stream)
            if isinstance(event, TokensAppended):
                self._metrics.observe_tokens(stream, len(event.token_ids), now)
                item = with_tokens(item, event)
            else:
                item = replace(item, end=event)
                del self._streams[event.request_id]
            items[event.request_id] = item
        if not self._streams:
            self._no_requests.set()
        self._delivery.submit(list(items.values()))
