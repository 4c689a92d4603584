"""The event loop of a simulation: arrivals, plans, and results when their time has come.

The scheduler decides and keeps its books as in the live service; only the messages of plans and
results are left out, as both sides are here. A worker runs its plans one after the other; each
takes the time that its :class:`StepCost` says, which the scheduler does not know, only the estimate
that the worker advertised.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from aptserve.evaluation import RequestRecord
from aptserve.workload import Trace

from aptserve_scheduler.arrays import Floats, Ints, Tiers
from aptserve_scheduler.core import (
    DecodeRun,
    DecodeTurns,
    Event,
    FinishReason,
    Objectives,
    PlanInFlight,
    RequestFinished,
    RequestId,
    RequestSpec,
    RequestTooLarge,
    Scheduler,
    SchedulerConfig,
    Tier,
    WorkerId,
)
from aptserve_scheduler.policies import Policy, create_policy
from aptserve_scheduler.sim.timeline import Timeline, TimelineRecorder
from aptserve_scheduler.sim.worker import SimWorker

_NUM_SAMPLES = 400
"""Samples of the timeline over the arrivals; what comes after them adds more."""
_PROGRESS_EVENTS = 64
_NUM_TIER_NUMBERS = max(Tier) + 1


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A simulated service. ValueError names a field out of range."""

    policy: str | Policy
    workers: tuple[SimWorker, ...]
    objectives: Objectives
    pipeline_depth: int = 1
    """Plans sent ahead of results. At 1 every decision knows all results, and planning is free
    unless ``planning_seconds`` says otherwise."""
    planning_seconds: float = 0.0
    """From a result, or an arrival, to the arrival of the plan at the worker."""
    max_tokens: int | None = None
    """What requests allow themselves to generate, as far as the largest pool could hold it; nobody
    knows then when they will end. ``None``: exactly what they will, as a load generator that
    ignores end-of-sequence tokens asks for."""
    max_waiting: int = 1_000_000
    learns_costs: bool = False
    """Whether the scheduler refines the advertised estimate from what it measures. Off, equal
    decodes are entered in one go, which is some times faster."""

    def __post_init__(self) -> None:
        if not self.workers:
            raise ValueError("workers: at least one is needed")
        if self.planning_seconds < 0:
            raise ValueError(f"planning_seconds must not be negative, not {self.planning_seconds}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class SimResult:
    """What became of a trace."""

    records: tuple[RequestRecord, ...]
    """In order of arrival."""
    duration_seconds: float
    """From the first arrival to the end of the last request."""
    num_steps: int
    num_preemptions: int
    num_promotions: int
    timeline: Timeline


def simulate(
    trace: Trace, config: SimConfig, on_progress: Callable[[int, int], None] | None = None
) -> SimResult:
    """Play a trace to its end. ``on_progress`` is told how many requests of how many ended."""
    return _Simulation(trace, config, on_progress or (lambda _done, _all: None)).run()


@dataclass(slots=True)
class _Worker:
    """A worker at work: its plans in order, and when it will be done with all of them."""

    sim: SimWorker
    plans: deque[tuple[Ints, float]] = field(default_factory=deque)
    """Of each the lengths at which its requests will end, and the seconds that it takes."""
    free_at: float = 0.0
    ending: list[RequestId] = field(default_factory=list)
    """Requests that end with the last iteration of the run that is in the books."""


class _Simulation:
    def __init__(
        self, trace: Trace, config: SimConfig, on_progress: Callable[[int, int], None]
    ) -> None:
        self._trace = trace
        self._config = config
        self._on_progress = on_progress
        policy = config.policy
        self._policy = create_policy(policy) if isinstance(policy, str) else policy
        self._scheduler = Scheduler(
            SchedulerConfig(
                pipeline_depth=config.pipeline_depth,
                max_waiting=config.max_waiting,
                learns_costs=config.learns_costs,
            ),
            self._policy,
        )
        self._workers = {WorkerId(w.spec.worker_id): _Worker(w) for w in config.workers}
        for worker in config.workers:
            self._scheduler.add_worker(worker.spec, 0.0)
        self._longest = max(_most_tokens(worker) for worker in config.workers)
        self._arrivals: list[float] = trace.arrival_seconds.tolist()
        self._num_prompt: list[int] = trace.num_prompt_tokens.tolist()
        self._num_output: list[int] = trace.num_output_tokens.tolist()
        self._num_total = {
            RequestId(str(index)): num_prompt + num_output
            for index, (num_prompt, num_output) in enumerate(
                zip(self._num_prompt, self._num_output, strict=True)
            )
        }
        self._next_arrival = 0
        self._records: list[RequestRecord | None] = [None] * len(trace)
        self._num_ended = 0
        self._due: list[tuple[float, int, WorkerId]] = []
        """Ends of iterations; the number keeps equal times in order."""
        self._num_due = 0
        span = self._arrivals[-1] if self._arrivals else 0.0
        self._recorder = TimelineRecorder(span / _NUM_SAMPLES)
        # Skipping ahead is only sound when nobody else can put a request back into the queue.
        self._may_skip = len(self._workers) == 1 and config.pipeline_depth == 1
        self._may_skip &= config.planning_seconds == 0.0 and not config.learns_costs

    def run(self) -> SimResult:
        now = 0.0
        while self._num_ended < len(self._trace):
            now = self._next_event()
            self._take_arrivals(now)
            self._take_results(now)
            if self._recorder.is_due(now):
                self._recorder.sample(now, self._scheduler.snapshot(now))
            for worker_id, worker in self._workers.items():
                self._plan(worker_id, worker, now)
            if not self._num_ended % _PROGRESS_EVENTS:
                self._on_progress(self._num_ended, len(self._trace))
        self._on_progress(self._num_ended, len(self._trace))
        self._recorder.sample(now, self._scheduler.snapshot(now))
        snapshot = self._scheduler.snapshot(now)
        return SimResult(
            records=tuple(record for record in self._records if record is not None),
            duration_seconds=now,
            num_steps=sum(worker.num_steps for worker in snapshot.workers),
            num_preemptions=snapshot.totals.num_preemptions,
            num_promotions=snapshot.totals.num_promotions,
            timeline=self._recorder.timeline(),
        )

    def _arrival_time(self) -> float:
        if self._next_arrival == len(self._arrivals):
            return math.inf
        return self._arrivals[self._next_arrival]

    def _next_event(self) -> float:
        now = min(self._arrival_time(), self._due[0][0] if self._due else math.inf)
        if math.isinf(now):
            waiting = len(self._trace) - self._num_ended
            raise RuntimeError(
                f"policy {self._policy.name} leaves {waiting} requests without service for ever"
            )
        return now

    def _take_arrivals(self, now: float) -> None:
        while self._arrival_time() <= now:
            index = self._next_arrival
            self._next_arrival += 1
            try:
                events = self._scheduler.add_request(self._spec(index), self._arrivals[index])
            except RequestTooLarge as error:
                self._refuse(index, str(error))
            else:
                self._note(events)

    def _spec(self, index: int) -> RequestSpec:
        trace, num_output = self._trace, self._num_output[index]
        allowed = self._config.max_tokens
        if allowed is not None:
            allowed = min(allowed, self._longest - self._num_prompt[index])
        return RequestSpec(
            request_id=RequestId(str(index)),
            prompt_token_ids=range(self._num_prompt[index]),
            max_tokens=num_output if allowed is None else max(num_output, allowed),
            objectives=self._config.objectives,
            tenant=trace.tenants[index],
            priority=int(trace.priorities[index]),
            expected_output_tokens=num_output if self._policy.is_oracle else None,
        )

    def _take_results(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, worker_id = heapq.heappop(self._due)
            worker = self._workers[worker_id]
            if worker.plans:
                stops_at, seconds = worker.plans.popleft()
                self._note(self._scheduler.complete(worker_id, stops_at, seconds, now))
                continue
            # The end of a run, whose iterations are in the books already.
            for request_id in worker.ending:
                self._note(self._scheduler.finish(request_id, FinishReason.STOP, now))
            worker.ending.clear()

    def _plan(self, worker_id: WorkerId, worker: _Worker, now: float) -> None:
        if not self._may_skip:
            while (plan := self._scheduler.begin(worker_id, now)) is not None:
                self._start(worker_id, worker, plan, now)
        elif worker.free_at <= now:
            made = self._scheduler.begin_or_run(worker_id, now)
            if isinstance(made, DecodeRun):
                self._skip(worker_id, worker, made, now)
            elif isinstance(made, DecodeTurns):
                self._take_turns(worker_id, worker, made, now)
            elif made is not None:
                self._start(worker_id, worker, made, now)

    def _start(self, worker_id: WorkerId, worker: _Worker, plan: PlanInFlight, now: float) -> None:
        seconds = worker.sim.cost.seconds(plan.starts, plan.num_tokens, plan.tiers)
        worker.free_at = max(now + self._config.planning_seconds, worker.free_at) + seconds
        worker.plans.append((self._stops_at(plan.request_ids), seconds))
        self._push(worker.free_at, worker_id)

    def _stops_at(self, request_ids: tuple[RequestId, ...]) -> Ints:
        """[n] tokens, prompt and output, that each of these will have in the end."""
        return np.array([self._num_total[request_id] for request_id in request_ids], np.int64)

    def _push(self, at: float, worker_id: WorkerId) -> None:
        heapq.heappush(self._due, (at, self._num_due, worker_id))
        self._num_due += 1

    def _skip(self, worker_id: WorkerId, worker: _Worker, run: DecodeRun, now: float) -> None:
        """Enter a run up to the iteration in which somebody arrives or with which somebody ends.

        It ends earlier where the policy may decide otherwise.
        """
        # Of those that each still has to get, one is known: the last iteration caches all but it.
        left = self._stops_at(run.request_ids) - run.num_cached - 1
        most = int(left.min())
        seconds = self._run_seconds(worker.sim, run, min(run.max_steps, most))
        # Summed one by one, as if each iteration had been an event of its own.
        is_longest = seconds > run.longest_seconds
        num_steps = 1 + int(is_longest.argmax()) if is_longest.any() else len(seconds)
        seconds[0] += now
        ends = seconds[:num_steps].cumsum()
        until = min(self._arrival_time(), run.until)
        ends = ends[: 1 + int(ends[:-1].searchsorted(until))]
        self._scheduler.enter_run(worker_id, run, ends, now)
        if len(ends) == most:
            worker.ending += [run.request_ids[entry] for entry in (left == most).nonzero()[0]]
        worker.free_at = float(ends[-1])
        self._push(worker.free_at, worker_id)

    def _run_seconds(self, worker: SimWorker, run: DecodeRun, num_steps: int) -> Floats:
        """[num_steps] seconds of the first iterations of a run."""
        num_sequences, cached = _by_tier(worker, run.tiers, run.num_cached)
        steps = np.arange(num_steps, dtype=np.float64)
        growing = [start + num * steps for num, start in zip(num_sequences, cached, strict=True)]
        return np.full(num_steps, worker.cost.decode_seconds(num_sequences, growing))

    def _take_turns(
        self, worker_id: WorkerId, worker: _Worker, turns: DecodeTurns, now: float
    ) -> None:
        """Enter turns up to the iteration in which somebody arrives or with which somebody ends."""
        left = self._stops_at(turns.request_ids) - turns.num_cached - 1
        arrival, end = self._arrival_time(), now
        while (entries := turns.next(end)) is not None:
            seconds = worker.sim.cost.decode_seconds(
                *_by_tier(worker.sim, turns.tiers[entries], turns.num_cached[entries])
            )
            end += float(seconds)
            turns.take(entries, end)
            left[entries] -= 1
            if end >= arrival or not left[entries].all():
                break
        self._scheduler.enter_turns(worker_id, turns, now)
        worker.ending += [turns.request_ids[entry] for entry in (left == 0).nonzero()[0]]
        worker.free_at = end
        self._push(end, worker_id)

    def _note(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestFinished):
                self._record(int(event.request_id), event)

    def _record(self, index: int, finished: RequestFinished) -> None:
        timing = finished.timing
        self._num_ended += 1
        self._records[index] = RequestRecord(
            request_id=finished.request_id,
            arrival_seconds=self._arrivals[index],
            num_prompt_tokens=finished.num_prompt_tokens,
            num_output_tokens=finished.num_output_tokens,
            ttft_seconds=timing.ttft_seconds,
            tbt_p99_seconds=timing.tbt_p99_seconds,
            total_seconds=timing.total_seconds,
            longest_wait_seconds=timing.longest_wait_seconds,
            completed=finished.error is None,
            error=finished.error,
            ttft_objective_seconds=self._config.objectives.ttft_seconds,
            tbt_objective_seconds=self._config.objectives.tbt_seconds,
            num_preemptions=timing.num_preemptions,
            tenant=self._trace.tenants[index],
        )

    def _refuse(self, index: int, error: str) -> None:
        self._num_ended += 1
        objectives = self._config.objectives
        self._records[index] = RequestRecord(
            request_id=str(index),
            arrival_seconds=self._arrivals[index],
            num_prompt_tokens=self._num_prompt[index],
            num_output_tokens=0,
            ttft_seconds=None,
            tbt_p99_seconds=None,
            total_seconds=0.0,
            longest_wait_seconds=0.0,
            completed=False,
            error=error,
            ttft_objective_seconds=objectives.ttft_seconds,
            tbt_objective_seconds=objectives.tbt_seconds,
            num_preemptions=0,
            tenant=self._trace.tenants[index],
        )


def _by_tier(worker: SimWorker, tiers: Tiers, num_cached: Ints) -> tuple[list[int], list[float]]:
    """Of each of the worker's tiers the sequences with a cache in it, and the tokens of these."""
    num_sequences = np.bincount(tiers, minlength=_NUM_TIER_NUMBERS).tolist()
    # Sums of whole numbers, so they are exact in floats too.
    cached = np.bincount(tiers, num_cached, _NUM_TIER_NUMBERS).tolist()
    numbers = [tier.tier for tier in worker.spec.tiers]
    return [num_sequences[number] for number in numbers], [cached[number] for number in numbers]


def _most_tokens(worker: SimWorker) -> int:
    """Tokens of the longest request that the worker can hold with keys and values."""
    spec = worker.spec
    return spec.num_units // spec.tiers[0].units_per_block * spec.block_size
