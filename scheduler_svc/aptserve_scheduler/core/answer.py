"""What comes back from a plan enters the books, as columns: from a worker or from a simulator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from aptserve_scheduler.arrays import Bools, Ints, all_of, any_of, indices
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Status
from aptserve_scheduler.core.types import FinishReason, RequestFinished
from aptserve_scheduler.core.worker_state import PlanInFlight, WorkerState
from aptserve_scheduler.policies.base import Policy, Service

_TOKEN = (0,)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What came back from a plan, as it enters the books; m entries of n are about live requests
    that got tokens or that the worker ended, in the order of the answer."""

    entries: Ints
    """[m] of the plan."""
    num_tokens: Ints
    """[m] new tokens; 0 for a sequence that the worker ended without one."""
    token_ids: Iterable[Sequence[int]]
    """The values of each, at least m."""
    reasons: dict[int, FinishReason]
    """By the place in these m: why the worker ended the sequence, of those that it ended."""
    ran: Bools
    """[n] which entries were computed."""
    step_seconds: float
    gap_seconds: float


def enter_answer(
    state: State,
    worker: WorkerState,
    plan: PlanInFlight,
    answer: Answer,
    now: float,
    policy: Policy,
) -> dict[int, RequestFinished]:
    """Enter what came back from a plan; returns who ended by it, by entry."""
    if policy.follows_service:
        policy.served(_service(state, plan, answer, now))
    _note_speed(worker, plan, answer)
    slots = plan.slots[answer.entries]
    _note_tokens(state, slots, answer, now)
    is_full = state.table.num_known[slots] >= state.table.max_total[slots]
    finished: dict[int, RequestFinished] = {}
    for place in sorted({*answer.reasons, *indices(is_full).tolist()}):
        reason = answer.reasons.get(place, FinishReason.LENGTH)
        finished[int(answer.entries[place])] = state.end(int(slots[place]), now, reason)
    return finished


def enter_plain_answer(
    state: State,
    worker: WorkerState,
    stops_at: Ints,
    step_seconds: float,
    now: float,
    policy: Policy,
) -> list[RequestFinished]:
    """Enter the answer that a flawless worker gives to the oldest plan in flight.

    It skips whoever has ended and gives a token, of the value 0, to each of the others whose known
    tokens are all computed. ``stops_at`` [n], an entry per sequence of the plan: the length in
    tokens, prompt and output, at which the worker ends it. Returns the ends, in plan order.
    """
    plan = worker.in_flight.popleft()
    live = state.table.status[plan.slots] != Status.ENDED
    known = state.table.num_known[plan.slots]
    entries = indices(live & (plan.ends == known))
    stops = known[entries] + 1 >= stops_at[entries]
    answer = Answer(
        entries=entries,
        num_tokens=np.ones(len(entries), np.int64),
        token_ids=repeat(_TOKEN),
        reasons=dict.fromkeys(indices(stops).tolist(), FinishReason.STOP),
        ran=live,
        step_seconds=step_seconds,
        gap_seconds=0.0,
    )
    follow_count(worker, plan, ~live)
    finished = enter_answer(state, worker, plan, answer, now, policy)
    state.table.return_from_flight(plan.slots)
    return list(finished.values())


def follow_count(worker: WorkerState, plan: PlanInFlight, skipped: Bools) -> None:
    """What the worker holds after a plan in which no sequence failed."""
    count = worker.count
    count.forget(plan.release)
    changed = (plan.units_before != plan.units_after) & ~skipped
    after = plan.units_after
    for entry in indices(changed).tolist():
        units = int(after[entry])
        count.record(plan.sequence_ids[entry], units, units)
    for entry in indices(plan.promoted & skipped).tolist():
        low, _ = count.of(plan.sequence_ids[entry])
        count.record(plan.sequence_ids[entry], low, int(after[entry]))


def _service(state: State, plan: PlanInFlight, answer: Answer, now: float) -> Service:
    num_output = np.zeros(len(plan.slots), np.int64)
    num_output[answer.entries] = answer.num_tokens
    got = answer.ran & (state.table.status[plan.slots] != Status.ENDED)
    return Service(
        slots=plan.slots[got],
        num_new_tokens=plan.num_tokens[got],
        num_output_tokens=num_output[got],
        seconds=answer.step_seconds,
        now=now,
    )


def _note_speed(worker: WorkerState, plan: PlanInFlight, answer: Answer) -> None:
    worker.num_steps += 1
    worker.step_seconds += answer.step_seconds
    # The first step has no step before it.
    worker.gap_seconds += answer.gap_seconds if worker.num_steps > 1 else 0.0
    if worker.learns_costs and any_of(answer.ran):
        row = plan.cost_features(answer.ran, worker.cost.tiers)
        worker.cost.observe(row, answer.step_seconds)


def _note_tokens(state: State, slots: Ints, answer: Answer, now: float) -> None:
    """Columns and records of all requests that got tokens; ``slots`` [m] as in the answer."""
    table, num_tokens, token_ids = state.table, answer.num_tokens, answer.token_ids
    got = num_tokens > 0
    if not all_of(got):  # some were ended without a token
        slots, num_tokens = slots[got], num_tokens[got]
        token_ids = [tokens for tokens in token_ids if tokens]
    if not len(slots):
        return
    wait = now - table.pending_since[slots]
    first = ~table.has_token[slots]
    is_slow = wait > table.tbt_objective[slots]
    if any_of(first):
        is_slow &= ~first
        table.missed_ttft[slots[first]] = wait[first] > table.ttft_objective[slots[first]]
        table.has_token[slots] = True
    table.num_gaps[slots] += num_tokens - first
    table.num_slow_gaps[slots] += is_slow
    table.judge(slots)
    table.pending_since[slots] = now
    table.num_known[slots] += num_tokens
    total = int(np.add.reduce(num_tokens))
    state.totals.num_output_tokens += total
    records = table.records(slots)
    for request, seconds, tokens in zip(records, wait.tolist(), token_ids, strict=False):
        request.output_token_ids += tokens
        if request.first_token_at is None:
            request.first_token_at = now
        else:
            request.gap_seconds.append(seconds)
    if total > len(slots):
        for request, num in zip(records, num_tokens.tolist(), strict=True):
            request.gap_seconds += [0.0] * (num - 1)
