"""The scheduler: a deterministic state machine driven by events.

``plan = scheduler.plan(worker_id, now); result = worker.run(plan); scheduler.apply(result)``

It does no I/O and has no clock: the caller passes the time. One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.core.answer import enter_plain_answer
from aptserve_scheduler.core.compose import compose, enter_decision
from aptserve_scheduler.core.decode_run import DecodeRun, enter_run
from aptserve_scheduler.core.decode_turns import DecodeTurns, enter_turns
from aptserve_scheduler.core.decodes import find_decodes
from aptserve_scheduler.core.errors import DuplicateRequest, QueueFull, RequestTooLarge
from aptserve_scheduler.core.integrity import check_state
from aptserve_scheduler.core.problem import build_problem
from aptserve_scheduler.core.results import check_unit_count, enter_result, match_result
from aptserve_scheduler.core.snapshot import SchedulerSnapshot, take_snapshot
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.types import (
    BatchPlan,
    Event,
    FinishReason,
    RequestId,
    RequestSpec,
    SequenceId,
    StepResult,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.core.worker_state import PlanInFlight, WorkerState
from aptserve_scheduler.policies.base import Arrival, BatchProblem, Decision, Policy

_RETRY_BOUNDS_SECONDS = (0.1, 10.0)


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of the core; ValueError names a field out of range."""

    pipeline_depth: int = 2
    """Plans sent to a worker ahead of results. 1 is the plain loop, the oracle for the others."""
    max_waiting: int = 4096
    """New requests are refused while this many wait. Preempted ones come back regardless."""
    learns_costs: bool = True
    """Whether measured iterations refine the worker's own estimate of its speed."""

    def __post_init__(self) -> None:
        for name in ("pipeline_depth", "max_waiting"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class Scheduler:
    """Requests in, plans out, results in, events out."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self._state = State(policy)
        self._next_worker_index = 0
        self._recheck_sizes = False

    @property
    def num_requests(self) -> int:
        """Live requests: accepted and not ended."""
        return len(self._state.table)

    def add_worker(self, spec: WorkerSpec, now: float) -> None:
        """Attach a worker that holds no sequence. ValueError if its id is in use or a field is bad.

        ``now`` is taken for symmetry with the other events.
        """
        state = self._state
        if spec.worker_id in state.workers:
            raise ValueError(f"worker {spec.worker_id!r} is attached already")
        usable = self.policy.usable_tiers(spec.tiers)
        worker = WorkerState(
            spec, self._next_worker_index, usable, learns_costs=self.config.learns_costs
        )
        self._next_worker_index += 1
        state.workers[spec.worker_id] = worker
        state.worker_at[worker.index] = worker
        self._recheck_sizes = True

    def remove_worker(self, worker_id: WorkerId, now: float) -> list[Event]:
        """Detach a worker: its requests wait again, in order of arrival, with the tokens they have.

        Those that no other attached worker could ever hold fail; without any worker they all wait.
        Raises :class:`UnknownWorker`.
        """
        state = self._state
        worker = state.worker(worker_id)
        for slot in worker.running.slots.tolist():
            state.return_to_queue(slot)
        for plan in worker.in_flight:
            state.table.return_from_flight(plan.slots)
        del state.workers[worker_id]
        del state.worker_at[worker.index]
        return self.fail_unservable(now)

    def add_request(self, spec: RequestSpec, now: float) -> list[Event]:
        """Accept a request that arrives now.

        Raises :class:`DuplicateRequest`, :class:`QueueFull` or :class:`RequestTooLarge` (only when
        workers are attached). A resumed request that has all its tokens ends at once with LENGTH.
        """
        state = self._state
        _check_request(spec)
        if spec.request_id in state.table.slot_of:
            raise DuplicateRequest(spec.request_id)
        self._check_size(spec)
        is_complete = len(spec.resume_token_ids) >= spec.max_tokens
        if len(state.waiting) >= self.config.max_waiting and not is_complete:
            state.totals.num_rejected += 1
            raise QueueFull(self.config.max_waiting, self._retry_after(now))
        slot = state.table.add(spec, now)
        state.waiting.add(slot, int(state.table.order[slot]))
        state.totals.num_accepted += 1
        state.totals.num_prompt_tokens += len(spec.prompt_token_ids)
        if self.policy.needs_history:
            self.policy.arrived(_arrival(spec, slot, now))
        return [state.end(slot, now, FinishReason.LENGTH)] if is_complete else []

    def finish(self, request_id: RequestId, reason: FinishReason, now: float) -> list[Event]:
        """End a request: abort, or a stop string was found. Unknown ids give no event.

        Its units are free for the next plan; what plans in flight still bring is dropped.
        """
        slot = self._state.table.slot_of.get(request_id)
        return [] if slot is None else [self._state.end(slot, now, reason)]

    def fail(self, request_id: RequestId, message: str, now: float) -> list[Event]:
        """End a request with an error; otherwise like :meth:`finish`."""
        slot = self._state.table.slot_of.get(request_id)
        return [] if slot is None else [self._state.end(slot, now, None, message)]

    def plan(self, worker_id: WorkerId, now: float) -> BatchPlan | None:
        """The worker's next iteration; ``None`` when there is nothing to do or enough is in flight.

        Raises :class:`PolicyError` for an unsound decision, which changes nothing.
        """
        made = self._decide(worker_id, now)
        if made is None:
            return None
        return compose(self._state, self._state.worker(worker_id), made[1], now)

    def begin(self, worker_id: WorkerId, now: float) -> PlanInFlight | None:
        """Like :meth:`plan`, for a simulator: of the plan only what the books hold of it.

        :meth:`complete` takes in its result.
        """
        made = self._decide(worker_id, now)
        if made is None:
            return None
        return enter_decision(self._state, self._state.worker(worker_id), made[1], now)

    def begin_or_run(
        self, worker_id: WorkerId, now: float
    ) -> PlanInFlight | DecodeRun | DecodeTurns | None:
        """Like :meth:`begin`, or several decodes at once as far as the policy knows them already.

        Some of them, at least one, are to be entered with :meth:`enter_run` or :meth:`enter_turns`
        before any other event. For simulators: it takes a worker whose every iteration is known
        beforehand.
        """
        made = self._decide(worker_id, now)
        if made is None:
            return None
        problem, decision = made
        state, worker = self._state, self._state.worker(worker_id)
        decodes = find_decodes(state, worker, problem, decision, self.policy)
        return enter_decision(state, worker, decision, now) if decodes is None else decodes

    def enter_run(self, worker_id: WorkerId, run: DecodeRun, ends: Floats, now: float) -> None:
        """Enter the first iterations of a run that starts now; ``ends`` [steps] are their times.

        Whoever is to end with the last of them, at the latest whoever has all of its ``max_tokens``
        then, is left to :meth:`finish` at that time.
        """
        enter_run(self._state, self._state.worker(worker_id), run, ends, now, self.policy)

    def enter_turns(self, worker_id: WorkerId, turns: DecodeTurns, now: float) -> None:
        """Like :meth:`enter_run`: the iterations taken, at least one, of turns that start now."""
        enter_turns(self._state, self._state.worker(worker_id), turns, now, self.policy)

    def apply(self, worker_id: WorkerId, result: StepResult, now: float) -> list[Event]:
        """Take in the answer to the oldest plan in flight.

        Raises :class:`ProtocolViolation` when it does not answer that plan as it should; nothing of
        it is believed then, and the worker must be removed.
        """
        worker = self._state.worker(worker_id)
        match = match_result(self._state, worker, result)
        check_unit_count(worker, result, match)
        events = enter_result(self._state, worker, result, match, now, self.policy)
        if self._recheck_sizes:
            events += self.fail_unservable(now)
        return events

    def complete(
        self, worker_id: WorkerId, stops_at: Ints, step_seconds: float, now: float
    ) -> list[Event]:
        """Like :meth:`apply` of a flawless answer to the oldest plan in flight, for a simulator.

        Each sequence whose known tokens are all computed gets one more. ``stops_at`` [n], an entry
        per sequence of the plan: its length, prompt and output, at which the worker ends it.
        Returns the ends of requests alone: nobody is told of the tokens.
        """
        worker = self._state.worker(worker_id)
        events: list[Event] = []
        events += enter_plain_answer(self._state, worker, stops_at, step_seconds, now, self.policy)
        if self._recheck_sizes:
            events += self.fail_unservable(now)
        return events

    def take_releases(self, worker_id: WorkerId) -> tuple[SequenceId, ...]:
        """Sequences that the worker should forget now, when no plan is due to tell it.

        Empty while a plan is in flight: a release message that overtakes a running plan would make
        the worker's unit count depend on timing. The next plan, or the next call, carries them.
        """
        worker = self._state.worker(worker_id)
        if worker.in_flight:
            return ()
        releases = worker.take_releases()
        worker.count.forget(releases)
        return releases

    def has_work(self, worker_id: WorkerId) -> bool:
        """Whether a plan is in flight, a request runs here, or one waits that fits here."""
        state = self._state
        worker = state.worker(worker_id)
        longest = state.table.max_total[state.waiting.slots]
        return bool(worker.in_flight or len(worker.running)) or bool(
            np.any(longest <= worker.max_request_tokens)
        )

    def fail_unservable(self, now: float) -> list[Event]:
        """Fail waiting requests that none of the attached workers could ever hold.

        Called by :meth:`remove_worker`, and by the first :meth:`apply` after a worker was added;
        a caller that wants it sooner after :meth:`add_worker` calls it itself. Without any worker
        nothing fails: one may come back.
        """
        state = self._state
        if not state.workers:
            return []
        self._recheck_sizes = False
        limit = max(worker.max_request_tokens for worker in state.workers.values())
        waiting = state.waiting.slots
        too_long = waiting[state.table.max_total[waiting] > limit].tolist()
        return [
            state.end(slot, now, None, _too_large(int(state.table.max_total[slot]), limit))
            for slot in too_long
        ]

    def snapshot(self, now: float) -> SchedulerSnapshot:
        """The present state as a frozen value."""
        return take_snapshot(self._state, now)

    def check_integrity(self) -> None:
        """Recount everything; raises :class:`IntegrityError` naming the numbers."""
        check_state(self._state)

    def _decide(self, worker_id: WorkerId, now: float) -> tuple[BatchProblem, Decision] | None:
        state = self._state
        worker = state.worker(worker_id)
        if len(worker.in_flight) >= self.config.pipeline_depth:
            return None
        if not len(state.waiting) and not len(worker.running):
            return None
        problem = build_problem(state, worker, now)
        decision = self.policy.decide(problem)
        return None if decision is None else (problem, decision)

    def _check_size(self, spec: RequestSpec) -> None:
        workers: list[WorkerState] = list(self._state.workers.values())
        longest = len(spec.prompt_token_ids) + spec.max_tokens
        limit = max((worker.max_request_tokens for worker in workers), default=longest)
        if longest > limit:
            raise RequestTooLarge(_too_large(longest, limit))

    def _retry_after(self, now: float) -> float:
        """Time in which the queue moved by a sixteenth of its length of late, within bounds."""
        low, high = _RETRY_BOUNDS_SECONDS
        state = self._state
        waiting = state.waiting.slots
        # The oldest arrival shows how long passing the whole queue takes at the present pace.
        oldest = now - float(state.table.arrival[waiting].min())
        return min(max(oldest / 16, low), high)


def _arrival(spec: RequestSpec, slot: int, now: float) -> Arrival:
    return Arrival(
        slot=slot,
        now=now,
        tenant=spec.tenant,
        priority=spec.priority,
        num_prompt_tokens=len(spec.prompt_token_ids),
        num_resumed_tokens=len(spec.resume_token_ids),
        max_tokens=spec.max_tokens,
        expected_output_tokens=spec.expected_output_tokens,
    )


def _check_request(spec: RequestSpec) -> None:
    if not len(spec.prompt_token_ids):
        raise ValueError(f"request {spec.request_id!r}: the prompt has no token")
    if spec.max_tokens < 1:
        raise ValueError(f"request {spec.request_id!r}: max_tokens is {spec.max_tokens}")


def _too_large(num_tokens: int, limit: int) -> str:
    return (
        f"prompt and output are {num_tokens} tokens together, "
        f"the memory of the largest worker holds {limit}"
    )
