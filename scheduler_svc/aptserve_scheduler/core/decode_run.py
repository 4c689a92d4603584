"""The same decode over and over, entered in the books at once; see :mod:`core.decodes`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints, Tiers
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.types import RequestId
from aptserve_scheduler.core.worker_state import WorkerState
from aptserve_scheduler.policies.base import BatchProblem, Decision, Horizon, Policy, Service

_MAX_STEPS = 4096
_ROUNDING_SECONDS = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRun:
    """Up to ``max_steps`` iterations, at least one, that each compute one token for each of these
    requests."""

    slots: Ints
    request_ids: tuple[RequestId, ...]
    tiers: Tiers
    num_cached: Ints
    """Cached tokens of each before the first iteration."""
    max_steps: int
    """Iterations for which memory and ``max_tokens`` last."""
    until: float
    """Time before which those after the first must start; the decision may be another then."""
    longest_seconds: float
    """An iteration that takes longer must be the last: it may cost somebody an objective."""

    @classmethod
    def of(
        cls,
        state: State,
        worker: WorkerState,
        problem: BatchProblem,
        decision: Decision,
        horizon: Horizon,
    ) -> DecodeRun | None:
        """As long a run of a decision as its horizon allows; ``None`` without memory for a step."""
        table, slots, now = state.table, decision.slots, problem.now
        num_cached = table.num_computed[slots]
        tiers = table.tier[slots]
        left = int((table.max_total[slots] - num_cached).min()) - 1
        most = int(min(left, _MAX_STEPS, horizon.num_iterations))
        longest_seconds = math.inf
        if horizon.while_late_alike:
            most = min(most, table.num_gaps_until_live(slots))
            pending = now - table.pending_since[slots]
            longest_seconds = float((table.tbt_objective[slots] - pending).min())
            longest_seconds -= _ROUNDING_SECONDS
        max_steps = _steps_in_memory(worker, num_cached, tiers, most)
        if max_steps < 1:
            return None
        return cls(
            slots=slots,
            request_ids=table.ids(slots),
            tiers=tiers,
            num_cached=num_cached,
            max_steps=max_steps,
            until=horizon.until,
            longest_seconds=longest_seconds,
        )


def _steps_in_memory(worker: WorkerState, num_cached: Ints, tiers: Tiers, most: int) -> int:
    """Largest number of steps, at most ``most``, after which all caches fit the pool."""
    block_size = worker.spec.block_size
    units = worker.ledger.units_per_block(tiers)
    # In block_size steps every cache takes exactly one block more, each at a step of its own.
    num_rounds, num_left = divmod(worker.ledger.num_free, int(units.sum()))
    if num_rounds * block_size >= most:
        return most
    grows_at = -num_cached % block_size + 1
    order = grows_at.argsort()
    first_unfit = int(units[order].cumsum().searchsorted(num_left, side="right"))
    return min(most, num_rounds * block_size + int(grows_at[order[first_unfit]]) - 1)


def enter_run(
    state: State, worker: WorkerState, run: DecodeRun, ends: Floats, now: float, policy: Policy
) -> None:
    """Enter the first ``len(ends)`` iterations of a run that starts now, by the times they end.

    The new tokens have the value 0. Requests that are to end with the last of them stay as they
    are until the caller ends them.
    """
    slots, num_steps = run.slots, len(ends)
    if not 1 <= num_steps <= run.max_steps:
        raise ValueError(f"{num_steps} steps of a run of at most {run.max_steps}")
    _note_gaps(state, slots, ends)
    tokens, seconds = np.full(len(slots), num_steps), float(ends[-1]) - now
    enter_tokens(state, worker, slots, tokens, num_steps, seconds)
    if policy.follows_service:
        policy.served(Service(slots, tokens, tokens, seconds, float(ends[-1])))


def enter_tokens(
    state: State,
    worker: WorkerState,
    slots: Ints,
    num_new: Ints,
    num_steps: int,
    seconds: float,
) -> None:
    """Enter that running requests got ``num_new`` [n] tokens each, and the worker's iterations."""
    table = state.table
    table.num_computed[slots] += num_new
    table.num_known[slots] += num_new
    after = worker.ledger.units_for(table.num_computed[slots], table.tier[slots])
    growth = after - table.units[slots]
    worker.ledger.take(int(growth.sum()))
    table.units[slots] = after
    for entry in growth.nonzero()[0].tolist():
        units = int(after[entry])
        worker.count.record(int(table.sequence[slots[entry]]), units, units)
    worker.next_plan_id += num_steps
    worker.num_steps += num_steps
    worker.step_seconds += seconds
    state.totals.num_output_tokens += int(num_new.sum())


def _note_gaps(state: State, slots: Ints, ends: Floats) -> None:
    table = state.table
    num_steps = len(ends)
    first_gaps = ends[0] - table.pending_since[slots]
    later_gaps = ends[1:] - ends[:-1]
    objective = table.tbt_objective[slots]
    num_slow = (first_gaps > objective).astype(np.int64)
    if num_steps > 1 and later_gaps.max() > objective.min():
        num_slow += (later_gaps[None] > objective[:, None]).sum(axis=1)
    table.num_gaps[slots] += num_steps
    table.num_slow_gaps[slots] += num_slow
    table.judge(slots)
    table.pending_since[slots] = ends[-1]
    gaps = [0.0, *later_gaps.tolist()]
    new_tokens = [0] * num_steps
    for request, gaps[0] in zip(table.records(slots), first_gaps.tolist(), strict=True):
        request.gap_seconds += gaps
        request.output_token_ids += new_tokens
