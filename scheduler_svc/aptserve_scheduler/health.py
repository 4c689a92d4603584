"""grpc.health.v1 as it really is: SERVING means that a request sent now would be answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog
from aptserve.errors import UnavailableError
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from aptserve_scheduler.driver import Driver

_log = structlog.stdlib.get_logger(__name__)
_CHECK_SECONDS = 1.0
_TELL_SECONDS = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthKeeper:
    """Watches the driver once a second, and whenever :meth:`wake` is called.

    NOT_SERVING without a worker, while draining, and when nothing has progressed for
    ``stall_seconds`` while requests are pending; an idle service is healthy. Accepted requests that
    have had no worker for ``worker_wait_seconds`` fail.

    ``watched`` services are those that this is said of, "" the whole; ``always`` those that serve
    from start to stop: workers and operators come before there is anything to infer with.
    """

    def __init__(
        self,
        driver: Driver,
        servicer: HealthServicer,
        *,
        watched: Sequence[str],
        always: Sequence[str],
        is_accepting: Callable[[], bool],
        stall_seconds: float,
        worker_wait_seconds: float,
    ) -> None:
        self._driver = driver
        self._servicer = servicer
        self._watched = tuple(watched)
        self._always = tuple(always)
        self._is_accepting = is_accepting
        self._stall_seconds = stall_seconds
        self._worker_wait_seconds = worker_wait_seconds
        self._had_worker_at = time.monotonic()
        self._is_serving: bool | None = None
        self._wake = asyncio.Event()

    async def close(self) -> None:
        """NOT_SERVING for good, all services."""
        await self._tell(self._servicer.enter_graceful_shutdown())

    def wake(self) -> None:
        """Look now: a worker came or went, or a drain began."""
        self._wake.set()

    async def open(self) -> None:
        """Say what holds before anybody can ask."""
        for service in self._always:
            await self._servicer.set(service, _SERVING)
        await self._publish(self._check(time.monotonic()))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            await self._publish(self._check(time.monotonic()))
            try:
                async with asyncio.timeout(_CHECK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _check(self, now: float) -> bool:
        if self._driver.workers:
            self._had_worker_at = now
        elif self._driver.num_pending and now - self._had_worker_at > self._worker_wait_seconds:
            _log.error("no worker came back", num_failed=self._driver.num_pending)
            self._driver.fail_all(UnavailableError("no worker has been attached for too long"))
        is_stalled = self._driver.num_pending > 0 and (
            now - self._driver.last_progress > self._stall_seconds
        )
        if is_stalled:
            self._driver.pump_soon()  # a lost wake-up must not be what keeps it so
        return self._is_accepting() and not is_stalled

    async def _publish(self, is_serving: bool) -> None:
        if is_serving == self._is_serving:
            return
        self._is_serving = is_serving
        _log.info("health changed", serving=is_serving, num_workers=len(self._driver.workers))
        for service in self._watched:
            await self._tell(self._servicer.set(service, _SERVING if is_serving else _NOT_SERVING))

    async def _tell(self, change: Awaitable[None]) -> None:
        """Make a change, which waits for whoever watches the service to take it."""
        try:
            async with asyncio.timeout(_TELL_SECONDS):
                await change
        except TimeoutError:
            _log.warning("a watcher of health does not read", seconds=_TELL_SECONDS)
