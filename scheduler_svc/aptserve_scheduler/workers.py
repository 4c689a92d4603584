"""What the driver knows of an attached worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aptserve.errors import AptServeError

from aptserve_scheduler.core.types import BatchPlan, SequenceId, WorkerSpec


class WorkerPort(Protocol):
    """The sending side of one worker's stream. Nothing here waits."""

    @property
    def device(self) -> str:
        """Name of the worker's device."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the worker's process when it registered."""

    def send_plan(self, plan: BatchPlan) -> None:
        """Work to do."""

    def send_release(self, sequence_ids: Sequence[SequenceId]) -> None:
        """Sequences to forget while no plan is due."""

    def send_detached(self) -> None:
        """The worker may go."""

    def cut(self, error: AptServeError) -> None:
        """End the stream with an error."""


@dataclass(slots=True)
class AttachedWorker:
    """A worker and what went over its stream."""

    spec: WorkerSpec
    port: WorkerPort
    is_leaving: bool = False
    num_plans_in_flight: int = 0
    used_share: float = 0.0
    """Share of its units in use, by the last plan."""
    silent_since: float = 0.0
    """On the loop's clock: since when an answer has been due, while plans are in flight."""
    alarm: asyncio.TimerHandle | None = None
    """When to look whether it has been silent for too long."""

    def count_plan(self, plan: BatchPlan, now: float) -> None:
        """A plan goes out, at ``now`` on the loop's clock."""
        if self.num_plans_in_flight == 0:
            self.silent_since = now
        self.num_plans_in_flight += 1
        self.used_share = plan.num_used_units / self.spec.num_units

    def count_answer(self, now: float) -> None:
        """A plan's answer came in."""
        self.num_plans_in_flight -= 1
        self.silent_since = now
