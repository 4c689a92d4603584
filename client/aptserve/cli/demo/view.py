"""What is known of a run while it goes on; the screen reads it, the run writes it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from aptserve.evaluation import RequestRecord
from aptserve.types import Status, Tier


class Phase(Enum):
    """Where a run is; the value is what the screen says."""

    LATER = "comes next"
    STARTING = "starting"
    WARMING_UP = "warming up"
    RUNNING = "running"
    DONE = "done"


@dataclass(slots=True)
class RunView:
    """One policy's run."""

    policy: str
    phase: Phase = Phase.LATER
    status: Status | None = None
    """As the service told it last."""
    waiting_history: list[int] = field(default_factory=list)
    """Length of the queue at each look."""
    longest_wait_seconds: float = 0.0
    """Of those in the queue, at any look."""
    num_requests: int = 0
    num_met: int = 0
    """Requests that ended within their objectives."""
    num_missed: int = 0
    """Requests that ended in another way."""
    _unit_looks: Counter[Tier] = field(default_factory=Counter)
    """Units in use, summed over the looks."""
    _started_at: float = 0.0
    _ended_at: float | None = None

    def start(self, num_requests: int) -> None:
        """The first request is about to be sent."""
        self.num_requests = num_requests
        self._started_at = time.monotonic()
        self.phase = Phase.RUNNING

    def on_record(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.num_met += record.is_good
        self.num_missed += not record.is_good

    def on_status(self, status: Status) -> None:
        """The service was asked."""
        self.status = status
        if self.phase is not Phase.RUNNING:
            return
        self.waiting_history.append(status.num_waiting)
        self.longest_wait_seconds = max(self.longest_wait_seconds, status.oldest_wait_seconds)
        for tier in (tier for worker in status.workers for tier in worker.tiers):
            self._unit_looks[tier.tier] += tier.num_used_units

    def end(self) -> None:
        """The last request has ended."""
        self._ended_at = time.monotonic()
        self.phase = Phase.DONE

    @property
    def used_units(self) -> dict[Tier, int]:
        """Units in use by tier: at present, or when the run is over the mean of it."""
        if self.status is None:
            return {}
        tiers = [tier for worker in self.status.workers for tier in worker.tiers]
        if self.phase is not Phase.DONE:
            return {tier.tier: tier.num_used_units for tier in tiers}
        num_looks = max(1, len(self.waiting_history))
        return {tier.tier: round(self._unit_looks[tier.tier] / num_looks) for tier in tiers}

    @property
    def num_units(self) -> int:
        """Units of the pool; 0 before a worker has attached."""
        return sum(worker.num_units for worker in self.status.workers) if self.status else 0

    @property
    def elapsed_seconds(self) -> float:
        """Since the first request was sent; stands still at the end."""
        if self.phase not in (Phase.RUNNING, Phase.DONE):
            return 0.0
        return (self._ended_at or time.monotonic()) - self._started_at
