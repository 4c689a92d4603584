"""Decodes that a simulator, which knows how long each takes, enters in the books at once.

An iteration that gives each of its requests one more token needs no plan and no answer when both
sides are the same program. Between two events a worker decodes the same batch over and over, or
its requests take turns by a simple rule, too; a policy that promises so
(:meth:`~aptserve_scheduler.policies.base.Policy.horizon`) lets the books skip to the end of such a
series. They are then as if each iteration had been planned and answered by itself.
"""

from __future__ import annotations

from aptserve_scheduler.arrays import Ints, all_of
from aptserve_scheduler.core.decode_run import DecodeRun
from aptserve_scheduler.core.decode_turns import DecodeTurns
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.worker_state import WorkerState
from aptserve_scheduler.policies.base import BatchProblem, Decision, Policy


def find_decodes(
    state: State, worker: WorkerState, problem: BatchProblem, decision: Decision, policy: Policy
) -> DecodeRun | DecodeTurns | None:
    """The series that a decision starts, of one iteration if it will not be repeated.

    ``None`` when it does anything else than give running requests a token each.
    """
    if worker.learns_costs or not _is_plain(state, worker, decision):
        return None
    horizon = policy.horizon(problem, decision)
    if horizon.members is None:
        return DecodeRun.of(state, worker, problem, decision, horizon)
    if not _can_decode(state, worker, problem.running.slots):
        return None
    return DecodeTurns(state, worker, horizon.members)


def _is_plain(state: State, worker: WorkerState, decision: Decision) -> bool:
    """Whether running requests get a token each and nothing else happens."""
    if worker.in_flight or worker.releases or len(decision.preempted):
        return False
    slots, tiers = decision.slots, decision.tiers
    return (
        all_of(decision.num_tokens == 1)
        and all_of(tiers == state.table.tier[slots])
        and _can_decode(state, worker, slots)
    )


def _can_decode(state: State, worker: WorkerState, slots: Ints) -> bool:
    """Whether all of these run here and have all tokens but the latest in their caches."""
    table = state.table
    # The last token of a chunked prompt looks like a decode, but a first token comes of it.
    can = table.has_token[slots] & (table.worker[slots] == worker.index)
    can &= table.num_known[slots] == table.num_computed[slots] + 1
    return all_of(can)
