"""From a worker's answer to events: matched with its plan first, then entered in the books."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.core.errors import ProtocolViolation
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Bools, RequestTable, Status
from aptserve_scheduler.core.types import (
    Event,
    FinishReason,
    SequenceId,
    SequenceOutput,
    StepResult,
    TokensAppended,
    make_many,
)
from aptserve_scheduler.core.worker_state import PlanInFlight, WorkerState
from aptserve_scheduler.policies.base import Policy, Service


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A result laid beside its plan. Numbers are entries of the plan."""

    outputs: list[tuple[int, SequenceOutput]]
    """Outputs of requests that are still live."""
    skipped: Bools
    failed: list[tuple[int, str]]

    def ran(self) -> Bools:
        """Entries that were computed."""
        ran = ~self.skipped
        ran[[entry for entry, _ in self.failed]] = False
        return ran


def match_result(state: State, worker: WorkerState, result: StepResult) -> Match:
    """Check an answer against the plan it must answer; :class:`ProtocolViolation` names the first
    disagreement. Changes nothing."""
    if not worker.in_flight or worker.in_flight[0].plan_id != result.plan_id:
        due = worker.in_flight[0].plan_id if worker.in_flight else "none"
        raise ProtocolViolation(f"result for plan {result.plan_id}, due is plan {due}")
    for name in ("step_seconds", "gap_seconds"):
        value = getattr(result, name)
        if not math.isfinite(value) or value < 0:
            raise ProtocolViolation(f"plan {result.plan_id}: {name} is {value}")
    plan = worker.in_flight[0]
    entries = _entries(plan, result)
    live = state.table.status[plan.slots] != Status.ENDED
    skipped = np.zeros(len(plan.slots), np.bool_)
    skipped[[entries[sequence_id] for sequence_id in result.skipped]] = True
    if np.any(skipped & live):
        raise ProtocolViolation(f"plan {plan.plan_id}: a sequence that has not ended was skipped")
    failed = [(entries[failure.sequence_id], failure.message) for failure in result.failures]
    is_live = live.tolist()
    match = Match(
        outputs=[
            (entry, output)
            for output in result.outputs
            if is_live[entry := entries[output.sequence_id]]
        ],
        skipped=skipped,
        failed=[(entry, message) for entry, message in failed if is_live[entry]],
    )
    _check_outputs(state, plan, result, match, live)
    return match


def _entries(plan: PlanInFlight, result: StepResult) -> dict[SequenceId, int]:
    """Entry of each sequence of the plan; every sequence of the result must be there, once."""
    entries = {sequence_id: entry for entry, sequence_id in enumerate(plan.sequence_ids)}
    answered: Sequence[SequenceId] = [
        *(output.sequence_id for output in result.outputs),
        *result.skipped,
        *(failure.sequence_id for failure in result.failures),
    ]
    for sequence_id in answered:
        if sequence_id not in entries:
            raise ProtocolViolation(
                f"plan {plan.plan_id} has no sequence {sequence_id}, the result has"
            )
    if len(set(answered)) != len(answered):
        raise ProtocolViolation(f"plan {plan.plan_id}: a sequence is answered twice")
    return entries


def _check_outputs(
    state: State, plan: PlanInFlight, result: StepResult, match: Match, live: Bools
) -> None:
    """A token is due from each entry that reached the last token the worker knows."""
    table = state.table
    known = table.num_known[plan.slots]
    reached_end = plan.ends == known
    answered = np.zeros(len(plan.slots), np.bool_)
    answered[[entry for entry, _ in match.outputs]] = True
    wrong = live & match.ran() & (answered != reached_end)
    if wrong.any():
        entry = int(np.argmax(wrong))
        raise ProtocolViolation(
            f"plan {plan.plan_id}: sequence {plan.sequence_ids[entry]} computed up to token "
            f"{int(plan.ends[entry])} of {int(known[entry])} and gave "
            f"{'a' if answered[entry] else 'no'} token"
        )
    room = (table.max_total[plan.slots] - known).tolist()
    abort = FinishReason.ABORT  # looking it up takes longer than the rest of the loop's body
    for entry, output in match.outputs:
        num_tokens = len(output.token_ids)
        if num_tokens > room[entry] or (num_tokens == 0 and output.finish_reason is None):
            raise ProtocolViolation(
                f"plan {plan.plan_id}: sequence {output.sequence_id} gave {num_tokens} tokens, "
                f"at most {room[entry]} are left"
            )
        if output.finish_reason is abort:
            raise ProtocolViolation(f"sequence {output.sequence_id} was aborted by the worker")


def check_unit_count(worker: WorkerState, result: StepResult, match: Match) -> None:
    """Follow the worker's own count through this plan and compare it with what it reports.

    :class:`ProtocolViolation` on a difference, after which the worker's count is of no use: the
    worker must be removed.
    """
    plan, count = worker.in_flight[0], worker.count
    count.forget(plan.release)
    changed = (plan.units_before != plan.units_after) & ~match.skipped
    after = plan.units_after.tolist()
    for entry in np.flatnonzero(changed).tolist():
        count.record(plan.sequence_ids[entry], after[entry], after[entry])
    for entry in np.flatnonzero(plan.promoted & match.skipped).tolist():
        low, _ = count.of(plan.sequence_ids[entry])
        count.record(plan.sequence_ids[entry], low, after[entry])
    for failure in result.failures:
        entry = plan.sequence_ids.index(failure.sequence_id)
        count.record(failure.sequence_id, 0, after[entry])
    if result.num_free_units is None:
        return
    low, high = count.bounds
    used = worker.spec.num_units - result.num_free_units
    if not low <= used <= high:
        raise ProtocolViolation(
            f"plan {plan.plan_id}: the worker uses {used} units, by the plans it has run it is "
            + (f"{low}" if low == high else f"{low} to {high}")
        )


def enter_result(
    state: State,
    worker: WorkerState,
    result: StepResult,
    match: Match,
    now: float,
    policy: Policy,
) -> list[Event]:
    """Enter a checked answer in the books; returns what happened to the requests, in plan order."""
    plan = worker.in_flight.popleft()
    if policy.follows_service:
        policy.served(_service(state, plan, result, match, now))
    _note_speed(worker, plan, result, match)
    _note_tokens(state, plan, match, now)
    table = state.table
    slots = plan.slots.tolist()
    is_full = (table.num_known[plan.slots] >= table.max_total[plan.slots]).tolist()
    events: list[Event] = []
    news = iter(_news_of_tokens(table, slots, match))
    for entry, output in match.outputs:
        slot = slots[entry]
        if output.token_ids:
            events.append(next(news))
        reason = output.finish_reason
        if reason is None and is_full[entry]:
            reason = FinishReason.LENGTH
        if reason is not None:
            events.append(state.end(slot, now, reason))
    for entry, message in match.failed:
        events.append(state.end(slots[entry], now, None, message))
    table.return_from_flight(plan.slots)
    return events


def _news_of_tokens(
    table: RequestTable, slots: list[int], match: Match
) -> tuple[TokensAppended, ...]:
    """An event for each output that has tokens."""
    got = [(entry, output) for entry, output in match.outputs if output.token_ids]
    return make_many(
        TokensAppended,
        len(got),
        request_id=[table.request_ids[slots[entry]] for entry, _ in got],
        token_ids=[output.token_ids for _, output in got],
        logprobs=[output.logprobs for _, output in got],
    )


def _service(
    state: State, plan: PlanInFlight, result: StepResult, match: Match, now: float
) -> Service:
    num_output = np.zeros(len(plan.slots), np.int64)
    for entry, output in match.outputs:
        num_output[entry] = len(output.token_ids)
    got = match.ran() & (state.table.status[plan.slots] != Status.ENDED)
    return Service(
        slots=plan.slots[got],
        num_new_tokens=plan.num_tokens[got],
        num_output_tokens=num_output[got],
        seconds=result.step_seconds,
        now=now,
    )


def _note_speed(worker: WorkerState, plan: PlanInFlight, result: StepResult, match: Match) -> None:
    worker.num_steps += 1
    worker.step_seconds += result.step_seconds
    # The first step has no step before it.
    worker.gap_seconds += result.gap_seconds if worker.num_steps > 1 else 0.0
    if worker.learns_costs and (ran := match.ran()).any():
        worker.cost.observe(plan.cost_features(ran, worker.cost.tiers), result.step_seconds)


def _note_tokens(state: State, plan: PlanInFlight, match: Match, now: float) -> None:
    """Columns and records of all requests that got tokens."""
    got = [(entry, output) for entry, output in match.outputs if output.token_ids]
    if not got:
        return
    table = state.table
    slots = plan.slots[[entry for entry, _ in got]]
    num_tokens = np.array([len(output.token_ids) for _, output in got], np.int64)
    wait = now - table.pending_since[slots]
    first = ~table.has_token[slots]
    table.missed_ttft[slots] |= first & (wait > table.ttft_objective[slots])
    table.num_gaps[slots] += num_tokens - first
    table.num_slow_gaps[slots] += ~first & (wait > table.tbt_objective[slots])
    table.has_token[slots] = True
    table.judge(slots)
    table.pending_since[slots] = now
    table.num_known[slots] += num_tokens
    state.totals.num_output_tokens += int(num_tokens.sum())
    for slot, seconds, (_, output) in zip(slots.tolist(), wait.tolist(), got, strict=True):
        request, tokens = table.request(slot), output.token_ids
        request.output_token_ids += tokens
        if request.first_token_at is None:
            request.first_token_at = now
        else:
            request.gap_seconds.append(seconds)
        if len(tokens) > 1:
            request.gap_seconds += [0.0] * (len(tokens) - 1)
