"""A whole worker in this process: the real session around a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from aptserve_worker.config import FAKE_MODEL, WorkerSettings
from aptserve_worker.device_thread import DeviceThread
from aptserve_worker.fake.engine import FakeEngine, StepGate
from aptserve_worker.fake.faults import Fault, FaultPlan
from aptserve_worker.fake.model import FakeModel
from aptserve_worker.session import WorkerSession


class FakeWorker:
    """Attaches to the scheduler at ``address`` for as long as the context is open.

    ``model``, ``step_seconds`` and ``faults`` shape the engine, ``settings`` are fields of
    :class:`WorkerSettings`; without a ``model`` they describe it too. Entering waits for the
    scheduler to accept the worker unless ``wait=False``. Leaving the context drops the stream like
    a killed process, unless :meth:`leave` came first.
    """

    def __init__(
        self,
        address: str,
        *,
        model: FakeModel | None = None,
        step_seconds: float = 0.0,
        faults: Sequence[Fault] = (),
        wait: bool = True,
        **settings: Any,
    ) -> None:
        self.settings = WorkerSettings(scheduler=address, model=FAKE_MODEL, **settings)
        fault_plan = FaultPlan(faults)
        self.engine = FakeEngine(
            model or FakeModel.from_settings(self.settings),
            step_seconds,
            fault_plan,
            overlaps=self.settings.overlap == "on",
        )
        self._encode = fault_plan.encode
        self._wait = wait
        self._device = DeviceThread(lambda: self.engine)
        self._session: WorkerSession | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def gate(self) -> StepGate:
        """Decides when steps run."""
        return self.engine.gate

    @property
    def session(self) -> WorkerSession:
        """The real session; only while the context is open."""
        if self._session is None:
            raise RuntimeError("the worker has not been entered")
        return self._session

    async def __aenter__(self) -> Self:
        info = await self._device.start()
        self._session = WorkerSession(self.settings, self._device, info, encode=self._encode)
        self._task = asyncio.create_task(self._session.run(), name="fake-worker")
        try:
            if self._wait:
                await self.wait_attached()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()

    async def wait_attached(self, *, num_attachments: int = 1, timeout_seconds: float = 10) -> None:
        """Return once attached for at least the n-th time; raises what ended the session."""
        attached = asyncio.create_task(
            self.session.wait_attached(
                num_attachments=num_attachments, timeout_seconds=timeout_seconds
            )
        )
        assert self._task is not None
        await asyncio.wait({attached, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not attached.done():
            attached.cancel()
            self._task.result()
            raise RuntimeError("the worker has left")
        attached.result()

    async def leave(self, timeout_seconds: float = 10) -> None:
        """Leave as after SIGTERM: Leaving, then wait for Detached."""
        self.session.leave()
        await self.join(timeout_seconds)

    async def join(self, timeout_seconds: float = 10) -> None:
        """Wait until the session has ended by itself; raises what ended it."""
        assert self._task is not None
        await asyncio.wait_for(asyncio.shield(self._task), timeout_seconds)

    async def kill(self) -> None:
        """Vanish: the stream breaks without a word. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.gate.open()
        if not await self._device.close():
            raise TimeoutError("the fake engine did not stop")
