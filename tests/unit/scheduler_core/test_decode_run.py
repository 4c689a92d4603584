"""Iterations entered at once leave the same books as iterations planned one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    DecodeRun,
    Event,
    FinishReason,
    RequestFinished,
    RequestSpec,
    Scheduler,
    SchedulerConfig,
    SequenceOutput,
    StepResult,
    TierSpec,
)
from aptserve_scheduler.core.table import RequestTable
from aptserve_scheduler.policies import Policy, create_policy, policy_names
from aptserve_scheduler.policies.apt_slo import AptSloConfig, AptSloPolicy
from aptserve_scheduler.policies.qos import QosConfig, QosPolicy
from support.scheduler import HIDDEN, KV, WORKER, make_request, make_worker

STEP = 2**-6
"""Seconds of an iteration; a power of two, so that sums are exact however they are made."""

IMPATIENT: dict[str, Callable[[], Policy]] = {
    "impatient apt-slo": lambda: AptSloPolicy(AptSloConfig(patience_seconds=0.2)),
    "impatient qos": lambda: QosPolicy(QosConfig(relegated_share=0.2, relegated_seconds=0.3)),
}
"""Policies whose patience of a minute ends within the seconds that are played here."""


def make_scheduler(policy: str, tiers: tuple[TierSpec, ...] = (KV,)) -> Scheduler:
    made = IMPATIENT[policy]() if policy in IMPATIENT else create_policy(policy)
    scheduler = Scheduler(SchedulerConfig(pipeline_depth=1, learns_costs=False), made)
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
    specs = {spec.request_id: spec for _, spec in arrivals}

    def note(events: list[Event]) -> None:
        ended.update({e.request_id: e for e in events if isinstance(e, RequestFinished)})

    while pending or scheduler.num_requests:
        while pending and pending[0][0] <= now:
            at, spec = pending.pop(0)
            known[spec.request_id] = len(spec.prompt_token_ids)
            scheduler.add_request(spec, at)
        plan = (scheduler.begin_or_run if in_runs else scheduler.plan)(WORKER, now)
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
            for spec in [specs[request_id] for request_id in plan.request_ids]:
                if known[spec.request_id] == len(spec.prompt_token_ids) + spec.max_tokens:
                    events = scheduler.finish(spec.request_id, FinishReason.LENGTH, now)
                    note(events)
        elif plan is not None:
            now += STEP
            if isinstance(plan, BatchPlan):
                events = scheduler.apply(WORKER, answer(plan, known), now)
            else:
                for request_id, end in zip(plan.request_ids, plan.ends.tolist(), strict=True):
                    known[request_id] += end == known[request_id]
                never = np.full(len(plan.slots), 10**6)
                events = scheduler.complete(WORKER, never, STEP, now)
            note(events)
        else:
            now = pending[0][0]
        scheduler.check_integrity()
    return ended, num_skipped


@pytest.mark.parametrize("policy", [*policy_names(), *IMPATIENT])
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
    run = scheduler.begin_or_run(WORKER, STEP)
    assert isinstance(run, DecodeRun)
    with pytest.raises(ValueError, match=f"0 steps of a run of at most {run.max_steps}"):
        scheduler.enter_run(WORKER, run, np.zeros(0), STEP)


def test_a_run_lasts_as_long_as_the_memory() -> None:
    """Four caches that begin their blocks at different steps; every free unit is used."""
    for num_units in range(16, 60):
        scheduler = Scheduler(
            SchedulerConfig(pipeline_depth=1, learns_costs=False), create_policy("fcfs")
        )
        scheduler.add_worker(make_worker(num_units=num_units, block_size=4), 0.0)
        known = {}
        for length in (1, 2, 4, 7):
            known[f"r{length}"] = length
            spec = make_request(f"r{length}", prompt_len=length, max_tokens=20)
            scheduler.add_request(spec, 0.0)
        plan = scheduler.plan(WORKER, 0.0)
        assert plan is not None
        scheduler.apply(WORKER, answer(plan, known), STEP)
        run = scheduler.begin_or_run(WORKER, STEP)
        if not isinstance(run, DecodeRun):
            continue  # not all of them fit for a first step
        num_steps = run.max_steps
        after = [-(-(cached + num_steps) // 4) * 2 for cached in run.num_cached.tolist()]
        one_more = [-(-(cached + num_steps + 1) // 4) * 2 for cached in run.num_cached.tolist()]
        assert sum(after) <= num_units
        assert sum(one_more) > num_units or num_steps == 20 - 1


def test_a_judgement_lasts_as_long_as_it_says() -> None:
    table = RequestTable()
    slot = table.add(make_request(tbt=0.5), 0.0)
    slots = np.array([slot])
    for num_gaps, num_slow, missed in (
        (0, 0, False),
        (98, 0, False),
        (99, 0, False),
        (30, 1, False),
        (100, 1, False),
        (198, 1, False),
        (150, 2, False),
        (0, 0, True),
    ):
        table.num_gaps[slot], table.num_slow_gaps[slot] = num_gaps, num_slow
        table.missed_ttft[slot] = missed
        table.judge(slots)
        before = float(table.miss_after[slot])
        most = table.num_gaps_judged_alike(slots)
        for num_more in range(min(most, 300) + 1):
            table.num_gaps[slot] = num_gaps + num_more
            table.judge(slots)
            assert (float(table.miss_after[slot]) == before) == (num_more < most)
