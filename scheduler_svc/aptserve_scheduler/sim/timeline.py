"""What the pool and the queue looked like over a simulated run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.core import SchedulerSnapshot


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Samples of all workers together; arrays of one length, by rising time."""

    seconds: Floats
    num_waiting: Ints
    num_running: Ints
    num_units: int
    """Units of all pools."""
    used_units: dict[str, Ints]
    """By tier name, ``kv``, ``hidden``."""


class TimelineRecorder:
    """Takes a sample each time an interval has passed, whatever the density of events."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._next = 0.0
        self._rows: list[tuple[float, SchedulerSnapshot]] = []

    def is_due(self, now: float) -> bool:
        """Whether the next sample should be taken."""
        return now >= self._next

    def sample(self, now: float, snapshot: SchedulerSnapshot) -> None:
        """Take one."""
        self._rows.append((now, snapshot))
        self._next = now + self._interval

    def timeline(self) -> Timeline:
        """All samples."""
        snapshots = [snapshot for _, snapshot in self._rows]
        tiers = {
            tier.tier
            for snapshot in snapshots
            for worker in snapshot.workers
            for tier in worker.tiers
        }
        return Timeline(
            seconds=np.array([now for now, _ in self._rows], np.float64),
            num_waiting=np.array([s.num_waiting for s in snapshots], np.int64),
            num_running=np.array([s.num_running for s in snapshots], np.int64),
            num_units=sum(worker.num_units for worker in snapshots[0].workers) if snapshots else 0,
            used_units={
                tier.name.lower(): np.array(
                    [
                        sum(t.num_used_units for w in s.workers for t in w.tiers if t.tier == tier)
                        for s in snapshots
                    ],
                    np.int64,
                )
                for tier in sorted(tiers)
            },
        )
