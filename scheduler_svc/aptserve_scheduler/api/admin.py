"""The API for operators."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version

import grpc
import psutil
import structlog
from aptserve.errors import InvalidArgumentError
from aptserve.v1 import admin_pb2, admin_pb2_grpc

from aptserve_scheduler.api.wire import TIER_TO_PROTO, cost_to_proto, to_duration
from aptserve_scheduler.config import SchedulerSettings
from aptserve_scheduler.core import BatchPlan, Totals, WorkerId, WorkerSnapshot
from aptserve_scheduler.driver import Driver
from aptserve_scheduler.feed import PlanFeed, SentPlan
from aptserve_scheduler.model import ModelSlot

_log = structlog.stdlib.get_logger(__name__)
_DEFAULT_DRAIN_SECONDS = 30.0
_MAX_DRAIN_SECONDS = 3600.0


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """GetStatus, WatchPlans, Drain."""

    def __init__(
        self,
        driver: Driver,
        feed: PlanFeed,
        models: ModelSlot,
        settings: SchedulerSettings,
        *,
        is_accepting: Callable[[], bool],
        start_draining: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._feed = feed
        self._models = models
        self._settings = settings
        self._is_accepting = is_accepting
        self._start_draining = start_draining
        self._version = version("apt-serve")
        self._process = psutil.Process()
        self._started_at = time.monotonic()

    async def GetStatus(  # noqa: N802 - the name of the RPC
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """What is attached, what waits, what runs."""
        snapshot = self._driver.snapshot()
        model = self._models.current
        return admin_pb2.GetStatusResponse(
            version=self._version,
            policy=self._settings.policy,
            pipeline_depth=self._settings.pipeline_depth,
            accepting=self._is_accepting(),
            model=model.name if model is not None else "",
            workers=[self._worker_status(w) for w in snapshot.workers],
            num_waiting=snapshot.num_waiting,
            num_running=snapshot.num_running,
            oldest_wait=to_duration(snapshot.oldest_wait_seconds),
            uptime=to_duration(time.monotonic() - self._started_at),
            totals=_totals(snapshot.totals),
            resident_bytes=self._process.memory_info().rss,
        )

    async def WatchPlans(  # noqa: N802
        self, request: admin_pb2.WatchPlansRequest, context: grpc.ServicerContext
    ) -> AsyncIterator[admin_pb2.WatchPlansResponse]:
        """What each batch contains and why, from now on."""
        worker_id = WorkerId(request.worker_id) if request.worker_id else None
        with self._feed.reader(worker_id) as reader:
            # Headers at once: the caller knows from when on it sees every plan.
            await context.send_initial_metadata(())
            while (read := await reader.next()) is not None:
                yield _plan_message(*read)

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> admin_pb2.DrainResponse:
        """Refuse requests from now on and wait for those accepted."""
        seconds = _DEFAULT_DRAIN_SECONDS
        if request.HasField("timeout"):
            seconds = request.timeout.seconds + request.timeout.nanos * 1e-9
        if not 0 < seconds <= _MAX_DRAIN_SECONDS:
            raise InvalidArgumentError("timeout", "must be more than 0 and at most 1 hour")
        _log.info("draining", num_pending=self._driver.num_pending, timeout_seconds=seconds)
        self._start_draining()
        num_unfinished = await self._driver.wait_no_requests(seconds)
        return admin_pb2.DrainResponse(num_unfinished=num_unfinished)

    def _worker_status(self, worker: WorkerSnapshot) -> admin_pb2.WorkerStatus:
        attached = self._driver.workers[worker.worker_id]
        port, spec = attached.port, attached.spec
        exact = {tier.tier: tier.exact for tier in spec.tiers}
        seconds = worker.cost.seconds_per_cached_token
        return admin_pb2.WorkerStatus(
            worker_id=worker.worker_id,
            device=port.device,
            num_units=worker.num_units,
            num_used_units=worker.num_used_units,
            block_size=worker.block_size,
            unit_bytes=port.unit_bytes,
            tiers=[
                admin_pb2.TierStatus(
                    tier=TIER_TO_PROTO[tier.tier],
                    units_per_block=tier.units_per_block,
                    num_used_units=tier.num_used_units,
                    num_sequences=tier.num_sequences,
                    seconds_per_cached_token=seconds.get(tier.tier, 0.0),
                    exact=exact[tier.tier],
                )
                for tier in worker.tiers
            ],
            num_plans_in_flight=worker.num_plans_in_flight,
            num_steps=worker.num_steps,
            gap_share=worker.gap_share,
            resident_bytes=port.resident_bytes,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            calibration=cost_to_proto(worker.cost),
        )


def _totals(totals: Totals) -> admin_pb2.Totals:
    names = [field.name for field in admin_pb2.Totals.DESCRIPTOR.fields]
    return admin_pb2.Totals(**{name: getattr(totals, name) for name in names})


def _plan_message(sent: SentPlan, num_dropped: int) -> admin_pb2.WatchPlansResponse:
    plan = sent.plan
    return admin_pb2.WatchPlansResponse(
        worker_id=plan.worker_id,
        plan_id=plan.plan_id,
        reason=plan.reason,
        decision_time=to_duration(sent.decision_seconds),
        planned=_planned(plan),
        preempted_request_ids=plan.preempted,
        promoted_request_ids=plan.promoted,
        num_waiting=plan.num_waiting,
        num_used_units=plan.num_used_units,
        num_dropped=num_dropped,
    )


def _planned(plan: BatchPlan) -> list[admin_pb2.PlannedRequest]:
    return [
        admin_pb2.PlannedRequest(
            request_id=part.request_id,
            tier=TIER_TO_PROTO[part.tier],
            num_computed_tokens=part.num_computed_tokens,
            num_new_tokens=part.num_new_tokens,
        )
        for part in plan.scheduled
    ]
