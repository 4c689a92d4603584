"""From the request table to the arrays that a policy sees."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, all_of, computed_once
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import RequestTable
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
    if not all_of(admissible):
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
        waiting=_TableCandidates(table, waiting, now),
        running=_TableCandidates(table, worker.running.slots.copy(), now),
    )


class _TableCandidates(Candidates):
    """Requests of the table; a column is gathered when a policy reads it for the first time.

    Most policies need half of the columns, or less. None may be read once the table has changed.
    """

    def __init__(self, table: RequestTable, slots: Ints, now: float) -> None:
        object.__setattr__(self, "slots", slots)
        self.__dict__["_table"] = table
        self.__dict__["_now"] = now

    _table: RequestTable
    _now: float

    @computed_once
    def pending_seconds(self) -> Floats:
        pending: Floats = np.maximum(self._now - self._table.pending_since[self.slots], 0.0)
        return pending

    @computed_once
    def num_tokens(self) -> Ints:
        return self._table.num_tokens(self.slots)

    @computed_once
    def num_computed_tokens(self) -> Ints:
        return self._table.num_computed[self.slots]

    @computed_once
    def max_num_tokens(self) -> Ints:
        return self._table.max_total[self.slots]

    @computed_once
    def num_units(self) -> Ints:
        return self._table.units[self.slots]

    @computed_once
    def tiers(self) -> Tiers:
        return self._table.tier[self.slots]

    @computed_once
    def schedulable(self) -> Bools:
        return self.num_tokens < self.max_num_tokens

    @computed_once
    def miss_after_seconds(self) -> Floats:
        return self._table.miss_after[self.slots]

    @computed_once
    def missed(self) -> Bools:
        return self.pending_seconds > self.miss_after_seconds

    @computed_once
    def ttft_seconds(self) -> Floats:
        return self._table.ttft_objective[self.slots]

    @computed_once
    def tbt_seconds(self) -> Floats:
        return self._table.tbt_objective[self.slots]

    @computed_once
    def age_seconds(self) -> Floats:
        return self._now - self._table.arrival[self.slots]

    @computed_once
    def num_prompt_tokens(self) -> Ints:
        return self._table.num_prompt[self.slots]

    @computed_once
    def num_output_tokens(self) -> Ints:
        return self._table.num_known[self.slots] - self.num_prompt_tokens

    @computed_once
    def priorities(self) -> Ints:
        return self._table.priority[self.slots]

    @computed_once
    def expected_output_tokens(self) -> Ints:
        return self._table.expected_output[self.slots]
