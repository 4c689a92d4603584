"""The scheduler's state as a frozen value, for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aptserve_scheduler.core.state import State, Totals
from aptserve_scheduler.core.types import CostCoefficients, Tier, WorkerId
from aptserve_scheduler.core.worker_state import WorkerState


@dataclass(frozen=True, slots=True)
class TierSnapshot:
    """Use of one tier on one worker."""

    tier: Tier
    units_per_block: int
    num_used_units: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker."""

    worker_id: WorkerId
    num_units: int
    num_used_units: int
    block_size: int
    max_request_tokens: int
    """Longest request, prompt and output, that the empty pool can hold."""
    num_running: int
    tiers: tuple[TierSnapshot, ...]
    num_plans_in_flight: int
    num_steps: int
    gap_share: float
    """Share of the time between steps in all time that was not idle, 0 to 1."""
    cost: CostCoefficients
    """Present estimate of the worker's speed."""


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The whole scheduler at one moment."""

    num_waiting: int
    num_running: int
    oldest_wait_seconds: float
    """Longest time that a waiting request has been without a token; 0 when none waits."""
    workers: tuple[WorkerSnapshot, ...]
    totals: Totals


def take_snapshot(state: State, now: float) -> SchedulerSnapshot:
    """A copy that later changes do not touch."""
    since = state.table.pending_since[state.waiting.slots]
    workers = tuple(_worker_snapshot(state, worker) for worker in state.workers.values())
    return SchedulerSnapshot(
        num_waiting=len(state.waiting),
        num_running=sum(worker.num_running for worker in workers),
        oldest_wait_seconds=max(0.0, now - float(since.min())) if len(since) else 0.0,
        workers=workers,
        totals=replace(state.totals),
    )


def _worker_snapshot(state: State, worker: WorkerState) -> WorkerSnapshot:
    slots = worker.running.slots
    tiers, units = state.table.tier[slots], state.table.units[slots]
    return WorkerSnapshot(
        worker_id=worker.spec.worker_id,
        num_units=worker.spec.num_units,
        num_used_units=worker.ledger.num_used,
        block_size=worker.spec.block_size,
        max_request_tokens=worker.max_request_tokens,
        num_running=len(slots),
        tiers=tuple(
            TierSnapshot(
                tier=tier.tier,
                units_per_block=tier.units_per_block,
                num_used_units=int(units[tiers == tier.tier].sum()),
                num_sequences=int(np.count_nonzero(tiers == tier.tier)),
            )
            for tier in worker.spec.tiers
        ),
        num_plans_in_flight=len(worker.in_flight),
        num_steps=worker.num_steps,
        gap_share=worker.gap_share,
        cost=worker.cost.coefficients,
    )
