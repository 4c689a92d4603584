"""From a worker's answer to events: matched with its plan first, then entered in the books."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools
from aptserve_scheduler.core.answer import Answer, enter_answer, follow_count
from aptserve_scheduler.core.errors import ProtocolViolation
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Status
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
from aptserve_scheduler.policies.base import Policy


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

    def answer(self, result: StepResult) -> Answer:
        """The outputs as columns."""
        outputs = [output for _, output in self.outputs]
        token_ids = [output.token_ids for output in outputs]
        return Answer(
            entries=np.array([entry for entry, _ in self.outputs], np.int64),
            num_tokens=np.array(list(map(len, token_ids)), np.int64),
            token_ids=token_ids,
            reasons={
                place: output.finish_reason
                for place, output in enumerate(outputs)
                if output.finish_reason is not None
            },
            ran=self.ran(),
            step_seconds=result.step_seconds,
            gap_seconds=result.gap_seconds,
        )


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
    follow_count(worker, plan, match.skipped)
    for failure in result.failures:
        entry = plan.sequence_ids.index(failure.sequence_id)
        count.record(failure.sequence_id, 0, int(plan.units_after[entry]))
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
    finished = enter_answer(state, worker, plan, match.answer(result), now, policy)
    news = iter(_news_of_tokens(plan, match))
    events: list[Event] = []
    for entry, output in match.outputs:
        if output.token_ids:
            events.append(next(news))
        if entry in finished:
            events.append(finished[entry])
    for entry, message in match.failed:
        events.append(state.end(int(plan.slots[entry]), now, None, message))
    state.table.return_from_flight(plan.slots)
    return events


def _news_of_tokens(plan: PlanInFlight, match: Match) -> tuple[TokensAppended, ...]:
    """An event for each output that has tokens."""
    got = [(entry, output) for entry, output in match.outputs if output.token_ids]
    return make_many(
        TokensAppended,
        len(got),
        request_id=[plan.request_ids[entry] for entry, _ in got],
        token_ids=[output.token_ids for _, output in got],
        logprobs=[output.logprobs for _, output in got],
    )
