"""The scheduler service: its life cycle, written once, in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
import structlog
import uvloop
from aptserve.errors import UnavailableError
from aptserve.v1 import (
    admin_pb2_grpc,
    inference_pb2_grpc,
    worker_pb2_grpc,
)
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from aptserve_scheduler.api.admin import AdminService
from aptserve_scheduler.api.admission import Admission
from aptserve_scheduler.api.inference import InferenceService
from aptserve_scheduler.api.interceptor import CallGuard
from aptserve_scheduler.api.worker_gateway import WorkerGateway
from aptserve_scheduler.config import SchedulerSettings, split_address
from aptserve_scheduler.core.scheduler import Scheduler, SchedulerConfig
from aptserve_scheduler.core.types import Objectives
from aptserve_scheduler.driver import Driver
from aptserve_scheduler.feed import PlanFeed
from aptserve_scheduler.health import HealthKeeper
from aptserve_scheduler.logs import configure_logging
from aptserve_scheduler.metrics import Metrics
from aptserve_scheduler.model import ModelSlot
from aptserve_scheduler.policies.registry import create_policy
from aptserve_scheduler.scrape import read_state
from aptserve_scheduler.text.encoder import PromptThread

_log = structlog.stdlib.get_logger(__name__)

INFERENCE = "aptserve.v1.InferenceService"
GATEWAY = "aptserve.v1.WorkerGateway"
ADMIN = "aptserve.v1.AdminService"
HEALTH = "grpc.health.v1.Health"

_MAX_MESSAGE_BYTES = 64 << 20
"""Register carries the tokenizer: the largest public ones are JSON of 35 MB. Requests of clients
have limits of their own far below, whose errors name the field."""

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A peer that falls silent is gone after 5 + 4 s: its requests must move on within 10 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # Without it a ping of another kind that is on its way holds the next one back for a minute.
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Peers may ping as often as once a second, idle or not.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Two services on one port would each get half of the workers.
    ("grpc.so_reuseport", 0),
)
_CLOSE_SECONDS = 2.0
"""How long calls may take to send their last message once their requests have ended."""


class StartError(Exception):
    """The service cannot start; the message is one line for the user."""


class SchedulerService:
    """One scheduler with its gRPC server.

    An async context manager, or :meth:`start` and :meth:`stop`. All on one event loop.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._is_draining = False
        self._stop_task: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._address: str | None = None
        self._metrics_address: str | None = None

    @property
    def address(self) -> str:
        """HOST:PORT where the service listens; known once it has started."""
        if self._address is None:
            raise RuntimeError("the service has not started")
        return self._address

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the Prometheus endpoint, if there is one."""
        return self._metrics_address

    @property
    def driver(self) -> Driver:
        """The live scheduler, for looking into; known once the service has started."""
        return self._driver

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop(0.0 if error is not None else None)

    async def start(self) -> None:
        """Build, listen, serve. Raises :class:`StartError` if an address cannot be had."""
        self._build()
        await self._health.open()
        try:
            self._listen()
        except StartError:
            await self._server.stop(None)
            raise
        await self._server.start()
        self._health_task = asyncio.create_task(self._health.run(), name="health")
        _log.info("listening", address=self.address, policy=self._settings.policy)

    def start_draining(self) -> None:
        """Refuse requests from now on; those accepted go on."""
        self._is_draining = True
        self._health.wake()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain, tell clients and workers, close. May be called again, to wait or to hurry.

        Accepted requests may go on for ``grace_seconds``, by default the setting; 0 ends a stop
        under way at once.
        """
        if self._health_task is None:
            return  # never started
        if grace_seconds is None:
            grace_seconds = self._settings.drain_grace_seconds
        if grace_seconds == 0:
            self._hurry.set()
        if self._stop_task is None:
            shut_down = self._shut_down(grace_seconds, self._health_task)
            self._stop_task = asyncio.create_task(shut_down, name="stop")
        await asyncio.shield(self._stop_task)

    def is_accepting(self) -> bool:
        """Whether a request sent now would be taken in, the queue's bound aside."""
        workers = self._driver.workers.values()
        return not self._is_draining and any(not w.is_leaving for w in workers)

    def _build(self) -> None:
        settings = self._settings
        self._metrics = Metrics()
        self._feed = PlanFeed()
        self._driver = Driver(
            Scheduler(
                SchedulerConfig(settings.pipeline_depth, settings.max_waiting),
                create_policy(settings.policy),
            ),
            self._metrics,
            self._feed,
            plan_timeout_seconds=settings.plan_timeout_seconds,
        )
        self._prompts = PromptThread(settings.max_waiting)
        self._models = ModelSlot(
            self._prompts, lambda: bool(self._driver.workers or self._driver.num_pending)
        )
        self._health_servicer = HealthServicer()
        self._health = HealthKeeper(
            self._driver,
            self._health_servicer,
            watched=("", INFERENCE),
            always=(ADMIN, GATEWAY),
            is_accepting=self.is_accepting,
            stall_seconds=settings.stall_seconds,
            worker_wait_seconds=settings.worker_wait_seconds,
        )
        self._driver.on_workers_changed = self._health.wake
        self._server = grpc.aio.server(interceptors=[self._guard()], options=_SERVER_OPTIONS)
        self._register_services()

    def _guard(self) -> CallGuard:
        tokens: dict[str, str] = {}
        if self._settings.api_key is not None:
            tokens[INFERENCE] = tokens[ADMIN] = self._settings.api_key.get_secret_value()
        if self._settings.join_token is not None:
            tokens[GATEWAY] = self._settings.join_token.get_secret_value()
        return CallGuard(tokens, max_bytes={GATEWAY: _MAX_MESSAGE_BYTES})

    def _register_services(self) -> None:
        settings, server = self._settings, self._server
        defaults = Objectives(settings.ttft_objective_seconds, settings.tbt_objective_seconds)
        admission = Admission(self._models, self._prompts, defaults, self.is_accepting)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self._driver, admission), server
        )
        gateway = WorkerGateway(
            self._driver,
            self._models,
            pipeline_depth=settings.pipeline_depth,
            is_stopping=lambda: self._stop_task is not None,
        )
        worker_pb2_grpc.add_WorkerGatewayServicer_to_server(gateway, server)
        admin = AdminService(
            self._driver,
            self._feed,
            self._models,
            settings,
            is_accepting=self.is_accepting,
            start_draining=self.start_draining,
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health_servicer, server)
        names = (INFERENCE, GATEWAY, ADMIN, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _listen(self) -> None:
        listen = self._settings.listen
        host = listen.rpartition(":")[0]
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {listen}: {error}") from error
        self._address = f"{host}:{port}"
        if self._settings.metrics_listen is not None:
            self._metrics_address = self._serve_metrics(self._settings.metrics_listen)

    def _serve_metrics(self, listen: str) -> str:
        host, port = split_address(listen)
        try:
            port = self._metrics.serve(host, port, lambda: read_state(self._driver.snapshot()))
        except OSError as error:
            raise StartError(f"cannot serve metrics on {listen}: {error}") from error
        return f"{listen.rpartition(':')[0]}:{port}"

    async def _shut_down(self, grace_seconds: float, health_task: asyncio.Task[None]) -> None:
        _log.info("stopping", num_pending=self._driver.num_pending)
        self._is_draining = True
        await self._health.close()
        await self._drain(grace_seconds)
        stopping = UnavailableError("the scheduler is stopping")
        self._driver.fail_all(stopping)
        self._feed.close()
        for worker in list(self._driver.workers.values()):
            worker.port.cut(stopping)
        await self._close_server()
        health_task.cancel()
        await asyncio.gather(health_task, return_exceptions=True)
        self._driver.close()
        self._prompts.close()
        await asyncio.to_thread(self._metrics.close)
        _log.info("stopped")

    async def _close_server(self) -> None:
        try:
            async with asyncio.timeout(2 * _CLOSE_SECONDS):
                await self._server.stop(_CLOSE_SECONDS)
        except TimeoutError:
            _log.warning("calls did not end", seconds=2 * _CLOSE_SECONDS)

    async def _drain(self, grace_seconds: float) -> None:
        """Wait for the accepted requests, for so long or until there is hurry."""
        drained = asyncio.create_task(self._driver.wait_no_requests(grace_seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drained, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, hurry):
            task.cancel()
        await asyncio.gather(drained, hurry, return_exceptions=True)


def run(settings: SchedulerSettings, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; a second one stops without a drain. Returns the exit code.

    ``on_ready`` is called with the address once the service listens.
    """
    configure_logging(settings.log_level, settings.log_format)
    return uvloop.run(_serve(settings, on_ready))


async def _serve(settings: SchedulerSettings, on_ready: Callable[[str], None] | None) -> int:
    service = SchedulerService(settings)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        await service.start()
    except StartError as error:
        _log.error("cannot start", error=str(error))
        return 1
    if on_ready is not None:
        on_ready(service.address)
    await signals.get()
    stopping = asyncio.create_task(service.stop())
    hurry = asyncio.create_task(signals.get())
    await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if hurry.done():
        await service.stop(0.0)
    hurry.cancel()
    await stopping
    return 0
