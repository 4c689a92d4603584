"""Everything the scheduler holds, and the few ways in which a request changes hands."""

from __future__ import annotations

from dataclasses import dataclass

from aptserve_scheduler.core.errors import UnknownWorker
from aptserve_scheduler.core.latency import timing_of
from aptserve_scheduler.core.slot_queue import SlotQueue
from aptserve_scheduler.core.table import NO_SEQUENCE, NO_WORKER, RequestTable, Status
from aptserve_scheduler.core.types import FinishReason, RequestFinished, SequenceId, WorkerId
from aptserve_scheduler.core.worker_state import WorkerState
from aptserve_scheduler.policies.base import Policy


@dataclass(slots=True)
class Totals:
    """Counts since the scheduler was built; field by field ``aptserve.v1.Totals``."""

    num_accepted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_rejected: int = 0
    num_preemptions: int = 0
    num_promotions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_objectives_met: int = 0


class State:
    """Requests, the waiting queue and the workers."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.table = RequestTable()
        self.waiting = SlotQueue()
        self.workers: dict[WorkerId, WorkerState] = {}
        self.worker_at: dict[int, WorkerState] = {}
        """Workers by the index that the request table uses."""
        self.totals = Totals()

    def worker(self, worker_id: WorkerId) -> WorkerState:
        """An attached worker; :class:`UnknownWorker` if it is not."""
        worker = self.workers.get(worker_id)
        if worker is None:
            raise UnknownWorker(worker_id)
        return worker

    def return_to_queue(self, slot: int) -> None:
        """A running request loses its memory and waits again with the tokens it has."""
        self._give_up_memory(slot)
        self.table.status[slot] = Status.WAITING
        self.waiting.add(slot, int(self.table.order[slot]))
        self.table.request(slot).num_preemptions += 1
        self.totals.num_preemptions += 1

    def end(
        self, slot: int, now: float, reason: FinishReason | None, error: str | None = None
    ) -> RequestFinished:
        """The one end of life: memory and place in the queue are given up, the report is made."""
        table, totals = self.table, self.totals
        if table.status[slot] == Status.RUNNING:
            self._give_up_memory(slot)
        else:
            self.waiting.remove(int(table.order[slot]))
        request = table.request(slot)
        succeeded = reason in (FinishReason.STOP, FinishReason.LENGTH)
        timing = timing_of(request, float(table.arrival[slot]), now, succeeded=succeeded)
        totals.num_finished += succeeded
        totals.num_aborted += reason is FinishReason.ABORT
        totals.num_failed += reason is None
        totals.num_objectives_met += timing.objectives_met
        if self._policy.needs_history:
            self._policy.ended(slot, len(request.output_token_ids), completed=succeeded)
        table.end(slot)
        return RequestFinished(
            request_id=request.spec.request_id,
            reason=reason,
            num_prompt_tokens=len(request.spec.prompt_token_ids),
            num_output_tokens=len(request.output_token_ids),
            timing=timing,
            error=error,
        )

    def _give_up_memory(self, slot: int) -> None:
        table = self.table
        worker = self.worker_at[int(table.worker[slot])]
        worker.running.remove(int(table.order[slot]))
        worker.ledger.take(-int(table.units[slot]))
        worker.releases.append(SequenceId(int(table.sequence[slot])))
        table.worker[slot] = NO_WORKER
        table.sequence[slot] = NO_SEQUENCE
        table.units[slot] = table.num_computed[slot] = 0
        table.tier[slot] = 0
