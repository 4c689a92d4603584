"""A whole system in one process: the real service, real workers, real sockets, tiny models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aptserve import AsyncClient
from aptserve_scheduler.config import SchedulerSettings
from aptserve_scheduler.service import SchedulerService
from aptserve_worker.config import WorkerSettings
from aptserve_worker.device_thread import DeviceThread
from aptserve_worker.engine import ModelEngine, build_engine
from aptserve_worker.session import WorkerSession


@dataclass
class LocalWorker:
    """The real session around a real engine."""

    settings: WorkerSettings
    device: DeviceThread
    session: WorkerSession
    task: asyncio.Task[None]
    engine: ModelEngine

    async def kill(self) -> None:
        """Drop the stream like a killed process."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.device.close()


@dataclass
class Cluster:
    service: SchedulerService
    workers: list[LocalWorker]
    client: AsyncClient

    async def add_worker(self, model: Path, **changes: Any) -> LocalWorker:
        settings = WorkerSettings(
            **{
                "scheduler": self.service.address,
                "model": str(model),
                "calibrate": False,
                "block_size": 4,
                "pool_units": 1200,
                "max_num_seqs": 40,
                "num_threads": 1,
                **changes,
            }
        )
        built: list[ModelEngine] = []

        def build() -> ModelEngine:
            built.append(build_engine(settings))
            return built[0]

        device = DeviceThread(build)
        info = await device.start()
        session = WorkerSession(settings, device, info)
        task = asyncio.create_task(session.run(), name=settings.worker_id)
        worker = LocalWorker(settings, device, session, task, built[0])
        self.workers.append(worker)
        await session.wait_attached()
        return worker

    async def complete_all(self, prompts: Sequence[list[int]], **sampling: Any) -> list[list[int]]:
        """Send all prompts at once and return their answers' tokens, in order."""
        completions = await asyncio.gather(
            *(self.client.complete(token_ids=p, timeout=60, **sampling) for p in prompts)
        )
        return [list(c.token_ids) for c in completions]

    def assert_empty(self) -> None:
        """Nothing is left anywhere: not in the ledger, not in any pool."""
        self.service.driver._core.check_integrity()
        snapshot = self.service.driver.snapshot()
        assert snapshot.num_waiting == snapshot.num_running == 0
        assert all(w.num_used_units == 0 for w in snapshot.workers)
        for worker in self.workers:
            worker.engine.allocator.check_integrity()
            assert worker.engine.allocator.num_free == worker.engine.allocator.num_units


@asynccontextmanager
async def cluster(
    model: Path, *, num_workers: int = 1, scheduler: dict[str, Any] | None = None, **worker: Any
) -> AsyncIterator[Cluster]:
    """A service with ``num_workers`` workers that serve ``model``, and a client."""
    async with AsyncExitStack() as stack:
        settings = SchedulerSettings(
            **{"listen": "127.0.0.1:0", "drain_grace_seconds": 0.0, **(scheduler or {})}
        )
        service = await stack.enter_async_context(SchedulerService(settings))
        client = await stack.enter_async_context(AsyncClient(service.address))
        running = Cluster(service, [], client)
        for _ in range(num_workers):
            stack.push_async_callback((await running.add_worker(model, **worker)).kill)
        yield running
