"""Plans as they are sent, for whoever watches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aptserve_scheduler.core.types import BatchPlan, WorkerId

_MAX_UNREAD_PLANS = 256


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A plan, and how long it took to compose it."""

    plan: BatchPlan
    decision_seconds: float


class PlanReader:
    """One reader's bounded queue. The oldest plans go when it is full."""

    def __init__(self, worker_id: WorkerId | None) -> None:
        self._worker_id = worker_id
        self._unread: deque[SentPlan] = deque()
        self._num_dropped = 0
        self._is_closed = False
        self._wake = asyncio.Event()

    def offer(self, sent: SentPlan) -> None:
        """Take a plan if it is of the watched worker."""
        if self._worker_id is not None and sent.plan.worker_id != self._worker_id:
            return
        if len(self._unread) == _MAX_UNREAD_PLANS:
            self._unread.popleft()
            self._num_dropped += 1
        self._unread.append(sent)
        self._wake.set()

    def close(self) -> None:
        """There will be no more plans."""
        self._is_closed = True
        self._wake.set()

    async def next(self) -> tuple[SentPlan, int] | None:
        """The next plan, and how many were missed before it; ``None`` at the end."""
        while not self._unread and not self._is_closed:
            self._wake.clear()
            await self._wake.wait()
        if not self._unread:
            return None
        num_dropped, self._num_dropped = self._num_dropped, 0
        return self._unread.popleft(), num_dropped


class PlanFeed:
    """Hands every plan to every reader; costs nothing while there is none."""

    def __init__(self) -> None:
        self._readers: set[PlanReader] = set()

    def publish(self, plan: BatchPlan, decision_seconds: float) -> None:
        """Show a plan that was sent."""
        if self._readers:
            sent = SentPlan(plan, decision_seconds)
            for reader in self._readers:
                reader.offer(sent)

    def close(self) -> None:
        """End all readers."""
        for reader in self._readers:
            reader.close()

    @contextmanager
    def reader(self, worker_id: WorkerId | None = None) -> Iterator[PlanReader]:
        """A reader of the plans from now on, of one worker or of all."""
        reader = PlanReader(worker_id)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
