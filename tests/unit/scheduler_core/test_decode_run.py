"""Iterations entered at once leave the same books as iterations planned one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    DecodeRun,
    RequestFinished,
    RequestSpec,
    Scheduler,
    SchedulerConfig,
    SequenceOutput,
    StepResult,
    TierSpec,
)
from aptserve_scheduler.policies import create_policy, policy_names
from support.scheduler import HIDDEN, KV, WORKER, make_request, make_worker

STEP = 2**-6
"""Seconds of an iteration; a power of two, so that sums are exact however they are made."""


def make_scheduler(policy: str, tiers: tuple[TierSpec, ...] = (KV,)) -> Scheduler:
    scheduler = Scheduler(
        SchedulerConfig(pipeline_depth=1, learns_costs=False), create_policy(policy)
    )
    scheduler.add_worker(make_worker(tiers=tiers, num_units=60), 0.0)
    return scheduler


def answer(plan: BatchPlan, known: dict[str, int]) -> StepResult:
    """A token for each sequence whose known tokens are all computed."""
    outputs = []
    for entry in plan.scheduled:
        if entry.num_computed_tokens + entry.num_new_tokens == known[entry.request_id]:
            known[entry.request_id] += 1
            outputs.append(SequenceOutput(entry.sequence_id, (0,)))
    return StepResult(plan.plan_id, tuple(outputs), STEP)


def play(
    policy: str,
    tiers: tuple[TierSpec, ...],
    arrivals: list[tuple[float, RequestSpec]],
    *,
    in_runs: bool,
) -> tuple[dict[str, RequestFinished], int]:
    """Every request's end, and how many iterations were entered in runs."""
    scheduler, now, num_skipped = make_scheduler(policy, tiers), 0.0, 0
    known: dict[str, int] = {}
    ended: dict[str, RequestFinished] = {}
    pending = list(arrivals)
    while pending or scheduler.num_requests:
        while pending and pending[0][0] <= now:
            at, spec = pending.pop(0)
            known[spec.request_id] = len(spec.prompt_token_ids)
            scheduler.add_request(spec, at)
        plan = (scheduler.plan_or_run if in_runs else scheduler.plan)(WORKER, now)
        scheduler.check_integrity()
        if isinstance(plan, DecodeRun):
            until = min(plan.until, pending[0][0] if pending else np.inf)
            most = max(np.ceil((until - now) / STEP), 1)
            num_steps = int(min(plan.max_steps, most if plan.longest_seconds >= STEP else 1))
            scheduler.enter_run(WORKER, plan, now + STEP * np.arange(1, num_steps + 1), now)
            for request_id in plan.request_ids:
                known[request_id] += num_steps
            num_skipped += num_steps
            now += num_steps * STEP
        elif plan is not None:
            now += STEP
            for event in scheduler.apply(WORKER, answer(plan, known), now):
                if isinstance(event, RequestFinished):
                    ended[event.request_id] = event
        else:
            now = pending[0][0]
        scheduler.check_integrity()
    return ended, num_skipped


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("gaps", [(0.0, 0.25, 2.0), (0.0, 0.05, 0.15)], ids=["idle", "crowded"])
@pytest.mark.parametrize("seed", range(4))
def test_runs_change_nothing(policy: str, gaps: tuple[float, ...], seed: int) -> None:
    rng = random.Random(seed)
    arrivals = []
    at = 0.0
    for index in range(25):
        at += rng.choice(gaps)
        spec = make_request(
            f"r{index}", prompt_len=rng.randint(1, 70), max_tokens=rng.randint(1, 40), ttft=0.1
        )
        guess, tenant = rng.choice((None, rng.randint(1, 40))), rng.choice("ab")
        priority = rng.choice((0, 0, 1, -2))
        spec = replace(spec, expected_output_tokens=guess, tenant=tenant, priority=priority)
        arrivals.append((at, spec))
    tiers = (KV, HIDDEN) if seed % 2 else (KV,)
    one_by_one, none = play(policy, tiers, arrivals, in_runs=False)
    at_once, num_skipped = play(policy, tiers, arrivals, in_runs=True)
    assert at_once == one_by_one
    assert none == 0
    assert len(at_once) == len(arrivals)
    assert num_skipped > 0


def test_a_run_has_bounds() -> None:
    scheduler = make_scheduler("fcfs")
    scheduler.add_request(make_request(max_tokens=20), 0.0)
    plan = scheduler.plan(WORKER, 0.0)
    assert plan is not None
    scheduler.apply(WORKER, answer(plan, {"r": 8}), STEP)
    run = scheduler.plan_or_run(WORKER, STEP)
    assert isinstance(run, DecodeRun)
    with pytest.raises(ValueError, match=f"0 steps of a run of at most {run.max_steps}"):
        scheduler.enter_run(WORKER, run, np.zeros(0), STEP)
