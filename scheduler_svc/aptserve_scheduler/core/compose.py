"""From a policy's decision to a plan: checked against every limit, then entered in the books."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Bools, Ints, all_of, any_of
from aptserve_scheduler.core.errors import PolicyError
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Status
from aptserve_scheduler.core.types import (
    BatchPlan,
    NewSequence,
    PlanId,
    ScheduledSequence,
    Tier,
    make_many,
)
from aptserve_scheduler.core.worker_state import PlanInFlight, WorkerState
from aptserve_scheduler.policies.base import Decision

# Plain numbers, with which numpy compares several times faster than with enumeration members.
_KV, _HIDDEN = int(Tier.KV), int(Tier.HIDDEN)
_TIER_BY_NUMBER = np.full(max(Tier) + 1, None, np.object_)
_TIER_BY_NUMBER[list(Tier)] = list(Tier)


def compose(state: State, worker: WorkerState, decision: Decision, now: float) -> BatchPlan:
    """:func:`enter_decision`, and the plan for the worker."""
    entered = enter_decision(state, worker, decision, now)
    return _batch_plan(state, worker, decision, entered)


def enter_decision(
    state: State, worker: WorkerState, decision: Decision, now: float
) -> PlanInFlight:
    """Enter a decision in the books; :class:`PolicyError` leaves all as it was.

    Units of the tokens that the plan computes are taken here, those of preempted requests are
    given back here: the worker releases before it runs, so both are true when the plan runs.
    """
    _check_shape(state, worker, decision)
    table, slots = state.table, decision.slots
    is_new = table.status[slots] == Status.WAITING
    starts = table.num_computed[slots]
    promoted = ~is_new & (table.tier[slots] != decision.tiers)
    _check_requests(state, worker, decision, is_new, starts)
    _check_residents(worker, decision, is_new)
    _check_tiers(state, worker, decision, promoted)
    ends = starts + decision.num_tokens
    before = table.units[slots]
    after = worker.ledger.units_for(ends, decision.tiers)
    freed = int(np.add.reduce(table.units[decision.preempted]))
    growth = int(np.add.reduce(after - before))
    if growth - freed > worker.ledger.num_free:
        raise PolicyError(
            f"the decision needs {growth} units, {worker.ledger.num_free} are free "
            f"and preemption gives {freed}"
        )

    for slot in decision.preempted.tolist():
        state.return_to_queue(slot)
    state.totals.num_promotions += int(np.count_nonzero(promoted))
    worker.ledger.take(growth)
    table.units[slots] = after
    table.num_computed[slots] = ends
    table.in_flight[slots] += 1
    table.tier[slots] = decision.tiers
    _admit(state, worker, slots[is_new], now)
    plan = PlanInFlight(
        plan_id=PlanId(worker.next_plan_id),
        release=worker.take_releases(),
        slots=slots.copy(),
        request_ids=table.ids(slots),
        sequence_ids=tuple(table.sequence[slots].tolist()),
        tiers=decision.tiers.copy(),
        starts=starts,
        num_tokens=decision.num_tokens.copy(),
        units_before=before,
        units_after=after,
        is_new=is_new,
        promoted=promoted,
    )
    worker.next_plan_id += 1
    worker.in_flight.append(plan)
    return plan


def _check_shape(state: State, worker: WorkerState, decision: Decision) -> None:
    slots, num_tokens = decision.slots, decision.num_tokens
    if not len(slots) or not len(slots) == len(num_tokens) == len(decision.tiers):
        raise PolicyError(
            f"{len(slots)} requests chosen with {len(num_tokens)} token counts "
            f"and {len(decision.tiers)} tiers"
        )
    if len(slots) > worker.spec.max_num_seqs:
        raise PolicyError(f"{len(slots)} requests chosen, the limit is {worker.spec.max_num_seqs}")
    total = int(np.add.reduce(num_tokens))
    if total > worker.spec.max_num_batched_tokens:
        raise PolicyError(
            f"{total} tokens chosen, the limit is {worker.spec.max_num_batched_tokens}"
        )
    everyone = np.concatenate([slots, decision.preempted])
    lowest, highest = int(np.minimum.reduce(everyone)), int(np.maximum.reduce(everyone))
    if lowest < 0 or highest >= state.table.capacity:
        raise PolicyError(f"slots {lowest} to {highest} do not all exist")
    named = np.zeros(state.table.capacity, np.bool_)
    named[everyone] = True
    if int(np.count_nonzero(named)) != len(everyone):
        raise PolicyError("a request is named twice")


def _check_requests(
    state: State, worker: WorkerState, decision: Decision, is_new: Bools, starts: Ints
) -> None:
    """``starts`` [n]: tokens cached of each."""
    table, slots = state.table, decision.slots
    longest = table.max_total[slots]
    # A request has a worker exactly while it runs there.
    is_candidate = table.worker[slots] == worker.index
    if any_of(is_new):
        fits = longest[is_new] <= worker.max_request_tokens
        is_candidate[is_new] = fits & (table.in_flight[slots[is_new]] == 0)
    preempted_here = table.worker[decision.preempted] == worker.index
    if not all_of(is_candidate) or not all_of(preempted_here):
        raise PolicyError("a request that is no candidate of this worker is named")
    length = table.num_tokens(slots)
    if any_of(length >= longest):
        raise PolicyError("a request whose end is in flight is chosen")
    if any_of((decision.num_tokens < 1) | (decision.num_tokens > length - starts)):
        raise PolicyError("a request is given no token or more than it has left")


def _check_residents(worker: WorkerState, decision: Decision, is_new: Bools) -> None:
    """A worker has a row for each sequence that holds memory, whether or not it is in the batch."""
    num_new = int(np.count_nonzero(is_new))
    num_residents = len(worker.running) - len(decision.preempted) + num_new
    if num_residents > worker.spec.max_num_seqs:
        raise PolicyError(
            f"{num_residents} requests would hold memory with {num_new} new ones, "
            f"the limit is {worker.spec.max_num_seqs}"
        )


def _check_tiers(state: State, worker: WorkerState, decision: Decision, promoted: Bools) -> None:
    """``promoted`` [n]: who runs in another tier than the one chosen."""
    held = state.table.tier[decision.slots[promoted]]
    can_change = (held == _HIDDEN) & (decision.tiers[promoted] == _KV)
    if not all_of(can_change) or not all_of(worker.is_usable_tier[decision.tiers]):
        raise PolicyError("a tier is chosen that the worker lacks or the request cannot change to")


def _admit(state: State, worker: WorkerState, slots: Ints, now: float) -> None:
    """Move requests from the queue to a worker, under fresh sequence ids."""
    if not len(slots):
        return
    table = state.table
    orders = table.order[slots]
    first_id = worker.next_sequence_id
    worker.next_sequence_id += len(slots)
    table.sequence[slots] = np.arange(first_id, worker.next_sequence_id)
    table.status[slots] = Status.RUNNING
    table.worker[slots] = worker.index
    state.waiting.remove_many(orders)
    worker.running.add_many(slots, orders)
    for slot in slots.tolist():
        request = table.request(slot)
        if request.first_taken_at is None:
            request.first_taken_at = now


def _batch_plan(
    state: State, worker: WorkerState, decision: Decision, entered: PlanInFlight
) -> BatchPlan:
    """What the worker is told of a decision that was just entered."""
    sequence_ids, request_ids = entered.sequence_ids, entered.request_ids
    changed_tier = entered.promoted.nonzero()[0].tolist()
    preempted = [state.table.request_ids[slot] for slot in decision.preempted.tolist()]
    return BatchPlan(
        plan_id=entered.plan_id,
        worker_id=worker.spec.worker_id,
        release=entered.release,
        promote=tuple(sequence_ids[i] for i in changed_tier),
        new=_new_sequences(state, entered.slots[entered.is_new]),
        scheduled=make_many(
            ScheduledSequence,
            len(sequence_ids),
            sequence_id=sequence_ids,
            request_id=request_ids,
            tier=_TIER_BY_NUMBER[entered.tiers].tolist(),
            num_computed_tokens=entered.starts.tolist(),
            num_new_tokens=entered.num_tokens.tolist(),
        ),
        reason=decision.reason,
        preempted=tuple(preempted),
        promoted=tuple(request_ids[i] for i in changed_tier),
        num_waiting=len(state.waiting),
        num_used_units=worker.ledger.num_used,
    )


def _new_sequences(state: State, slots: Ints) -> tuple[NewSequence, ...]:
    if not len(slots):
        return ()
    table = state.table
    requests = [table.request(slot) for slot in slots.tolist()]
    specs = [request.spec for request in requests]
    return make_many(
        NewSequence,
        len(requests),
        sequence_id=table.sequence[slots].tolist(),
        request_id=[spec.request_id for spec in specs],
        token_ids=[request.known_token_ids for request in requests],
        num_prompt_tokens=table.num_prompt[slots].tolist(),
        tier=_TIER_BY_NUMBER[table.tier[slots]].tolist(),
        max_tokens=[spec.max_tokens for spec in specs],
        sampling=[spec.sampling for spec in specs],
    )
