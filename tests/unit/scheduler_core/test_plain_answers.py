"""The simulator's way through an iteration leaves the same books as the live service's way.

The live one makes plans and takes results (``plan``, ``apply``), the simulator's makes no message
and no event per token (``begin``, ``complete``). Both are played side by side.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    Event,
    FinishReason,
    PlanInFlight,
    RequestFinished,
    Scheduler,
    SchedulerConfig,
    SequenceOutput,
    StepResult,
    WorkerId,
)
from aptserve_scheduler.core.table import RequestTable
from aptserve_scheduler.policies import create_policy, policy_names
from support.scheduler import HIDDEN, KV, make_request, make_worker

NUM_REQUESTS = 20
WORKERS = (WorkerId("one"), WorkerId("two"))


@dataclass
class Pair:
    """A live scheduler and a simulated one, with what a worker must know to answer the former."""

    live: Scheduler
    simulated: Scheduler
    num_total: dict[str, int] = field(default_factory=dict)
    """Tokens, prompt and output, at which the worker ends each request."""
    num_known: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def note(self, events: list[Event]) -> list[RequestFinished]:
        """The ends among these events."""
        ends = [event for event in events if isinstance(event, RequestFinished)]
        self.ended.update(event.request_id for event in ends)
        return ends

    def answer(self, plan: BatchPlan, seconds: float) -> StepResult:
        """What a worker would say: a token for each sequence that is through with what it knows."""
        outputs = []
        for entry in plan.scheduled:
            request_id = entry.request_id
            end = entry.num_computed_tokens + entry.num_new_tokens
            if request_id in self.ended or end < self.num_known[request_id]:
                continue
            self.num_known[request_id] += 1
            is_last = self.num_known[request_id] == self.num_total[request_id]
            reason = FinishReason.STOP if is_last else None
            outputs.append(SequenceOutput(entry.sequence_id, (0,), reason))
        skipped = [e.sequence_id for e in plan.scheduled if e.request_id in self.ended]
        return StepResult(plan.plan_id, tuple(outputs), seconds, skipped=tuple(skipped))

    def stops_at(self, plan: PlanInFlight) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([self.num_total[request_id] for request_id in plan.request_ids], np.int64)

    def check(self) -> None:
        for scheduler in (self.live, self.simulated):
            scheduler.check_integrity()
        assert books(self.live) == books(self.simulated)


def books(scheduler: Scheduler) -> object:
    """All that a scheduler holds, as values to be compared."""
    state = scheduler._state
    table = state.table
    columns = {name: getattr(table, name).tolist() for name, _ in RequestTable._COLUMNS}
    requests = [
        None
        if request is None
        else [getattr(request, name) for name in type(request).__slots__ if name != "spec"]
        for request in table.requests
    ]
    workers = [
        (
            worker.running.slots.tolist(),
            worker.ledger.num_used,
            worker.count._bounds,
            worker.count.bounds,
            [(plan.plan_id, plan.release, plan.ends.tolist()) for plan in worker.in_flight],
            worker.releases,
            worker.next_plan_id,
            worker.next_sequence_id,
            (worker.num_steps, worker.step_seconds, worker.gap_seconds),
            worker.cost.coefficients,
        )
        for worker in state.workers.values()
    ]
    return columns, requests, table._free, state.waiting.slots.tolist(), workers, state.totals


def make_scheduler(policy: str, rng: random.Random) -> Scheduler:
    config = SchedulerConfig(
        pipeline_depth=rng.choice((1, 2)), learns_costs=rng.choice((False, True))
    )
    scheduler = Scheduler(config, create_policy(policy))
    tiers = rng.choice(((KV,), (KV, HIDDEN)))
    for worker_id in WORKERS[: rng.choice((1, 1, 2))]:
        scheduler.add_worker(make_worker(worker_id, tiers=tiers, num_units=60), 0.0)
    return scheduler


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_keep_the_same_books(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(make_scheduler(policy, random.Random(seed)), make_scheduler(policy, rng))
    under_way: deque[tuple[WorkerId, BatchPlan, PlanInFlight]] = deque()
    num_requests, now, num_iterations = 0, 0.0, 0
    worker_ids = list(pair.live._state.workers)
    while num_requests < NUM_REQUESTS or pair.live.num_requests:
        now += rng.uniform(0.0, 0.05)
        if num_requests < NUM_REQUESTS and rng.random() < 0.4:
            prompt_len, max_tokens = rng.randint(1, 70), rng.randint(1, 40)
            spec = make_request(
                f"r{num_requests}", prompt_len=prompt_len, max_tokens=max_tokens, ttft=0.3
            )
            guess, tenant = rng.choice((None, rng.randint(1, 40))), rng.choice("ab")
            spec = replace(spec, expected_output_tokens=guess, tenant=tenant)
            num_requests += 1
            pair.num_known[spec.request_id] = prompt_len
            # Some end before their max_tokens, some by them.
            pair.num_total[spec.request_id] = prompt_len + rng.randint(1, max_tokens + 5)
            pair.live.add_request(spec, now)
            pair.simulated.add_request(spec, now)
        if rng.random() < 0.02 and pair.live.num_requests:
            request_id = rng.choice(sorted(pair.live._state.table.slot_of))
            events = pair.live.finish(request_id, FinishReason.ABORT, now)
            assert pair.note(events) == pair.simulated.finish(request_id, FinishReason.ABORT, now)
        for worker_id in worker_ids:
            plan, begun = pair.live.plan(worker_id, now), pair.simulated.begin(worker_id, now)
            assert (plan is None) == (begun is None)
            if plan is not None and begun is not None:
                check_same(plan, begun)
                under_way.append((worker_id, plan, begun))
        pair.check()
        if under_way and rng.random() < 0.8:
            worker_id, plan, begun = under_way.popleft()
            num_iterations += 1
            seconds = rng.uniform(0.001, 0.05)
            stops_at = pair.stops_at(begun)
            ends = pair.note(pair.live.apply(worker_id, pair.answer(plan, seconds), now))
            assert pair.simulated.complete(worker_id, stops_at, seconds, now) == ends
            pair.check()
    assert len(pair.ended) == NUM_REQUESTS
    assert num_iterations > NUM_REQUESTS


def check_same(plan: BatchPlan, begun: PlanInFlight) -> None:
    """A worker that reads the plan sees the sequences that the simulator sees."""
    assert plan.release == begun.release
    assert [asdict(entry) for entry in plan.scheduled] == [
        {
            "sequence_id": sequence_id,
            "request_id": request_id,
            "tier": tier,
            "num_computed_tokens": start,
            "num_new_tokens": num_tokens,
        }
        for sequence_id, request_id, tier, start, num_tokens in zip(
            begun.sequence_ids,
            begun.request_ids,
            begun.tiers.tolist(),
            begun.starts.tolist(),
            begun.num_tokens.tolist(),
            strict=True,
        )
    ]
