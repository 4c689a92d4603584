"""Looks at the service from time to time while a run lasts: the queue, the pool by tier."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from aptserve import AptServeError, AsyncClient, Status, Tier
from aptserve.evaluation import PoolTimeline

_INTERVAL_SECONDS = 0.25


class PoolObserver:
    """Samples the status of a service; times are seconds of ``time.monotonic``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._samples: list[tuple[float, Status]] = []

    async def sample(self) -> Status:
        """Take a sample now."""
        status = await self._client.status()
        self._samples.append((time.monotonic(), status))
        return status

    @contextlib.asynccontextmanager
    async def observing(self) -> AsyncIterator[None]:
        """Take samples until the end of the block."""
        task = asyncio.create_task(self._observe())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()  # it never returns, so this raises what ended it

    def timeline(self, started_at: float) -> PoolTimeline:
        """What a run that started then saw, from the last sample before it on.

        ValueError when nothing was sampled.
        """
        num_before = sum(at < started_at for at, _ in self._samples)
        samples = [
            (max(0.0, at - started_at), status)
            for at, status in self._samples[max(0, num_before - 1) :]
        ]
        statuses = [status for _, status in samples]
        return PoolTimeline(
            seconds=tuple(at for at, _ in samples),
            num_waiting=tuple(status.num_waiting for status in statuses),
            num_running=tuple(status.num_running for status in statuses),
            # A worker that leaves for a while takes its units with it.
            num_units=max(sum(worker.num_units for worker in s.workers) for s in statuses),
            used_units={
                tier.value: tuple(_used_units(status, tier) for status in statuses)
                for tier in Tier
                if any(t.tier is tier for s in statuses for w in s.workers for t in w.tiers)
            },
        )

    async def _observe(self) -> None:
        while True:
            # A service that does not answer now leaves a hole; what it did to the requests, their
            # records tell.
            with contextlib.suppress(AptServeError):
                await self.sample()
            await asyncio.sleep(_INTERVAL_SECONDS)


def _used_units(status: Status, tier: Tier) -> int:
    return sum(t.num_used_units for w in status.workers for t in w.tiers if t.tier is tier)
