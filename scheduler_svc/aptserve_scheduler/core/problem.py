"""From the request table to the arrays that a policy sees."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Ints, RequestTable
from aptserve_scheduler.core.worker_state import WorkerState
from aptserve_scheduler.policies.base import BatchProblem, Candidates


def build_problem(state: State, worker: WorkerState, now: float) -> BatchProblem:
    """The next iteration of one worker.

    Waiting requests are left out while a plan in flight still contains them (their tokens are not
    all known) and when this worker's pool could never hold them.
    """
    table = state.table
    waiting = state.waiting.slots.copy()
    admissible = table.in_flight[waiting] == 0
    admissible &= table.max_total[waiting] <= worker.max_request_tokens
    if not admissible.all():
        waiting = waiting[admissible]
    spec = worker.spec
    return BatchProblem(
        now=now,
        worker=worker.index,
        num_units=spec.num_units,
        num_free_units=worker.ledger.num_free,
        block_size=spec.block_size,
        tiers=worker.usable_tiers,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        cost=worker.cost.coefficients,
        waiting=_candidates(table, waiting, now),
        running=_candidates(table, worker.running.slots.copy(), now),
    )


def _candidates(table: RequestTable, slots: Ints, now: float) -> Candidates:
    pending = np.maximum(now - table.pending_since[slots], 0.0)
    num_tokens = table.num_tokens(slots)
    max_total = table.max_total[slots]
    miss_after = table.miss_after[slots]
    num_prompt = table.num_prompt[slots]
    return Candidates(
        slots=slots,
        pending_seconds=pending,
        num_tokens=num_tokens,
        num_computed_tokens=table.num_computed[slots],
        max_num_tokens=max_total,
        num_units=table.units[slots],
        tiers=table.tier[slots],
        schedulable=num_tokens < max_total,
        miss_after_seconds=miss_after,
        missed=pending > miss_after,
        ttft_seconds=table.ttft_objective[slots],
        tbt_seconds=table.tbt_objective[slots],
        age_seconds=now - table.arrival[slots],
        num_prompt_tokens=num_prompt,
        num_output_tokens=table.num_known[slots] - num_prompt,
        priorities=table.priority[slots],
        expected_output_tokens=table.expected_output[slots],
    )
