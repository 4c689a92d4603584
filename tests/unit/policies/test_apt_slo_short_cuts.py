"""What our policy for objectives leaves out of its thinking changes no decision of it."""

from __future__ import annotations

import math
import random

import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.apt_slo import AptSloPolicy, _Round
from aptserve_scheduler.policies.base import decodes_all_running
from support.problems import Row, make_problem


def crowded_problem(rng: random.Random) -> BatchProblem:
    """Little memory is free, and more wait than fit."""

    def miss_after() -> float:
        return rng.choice((-1.0, 5.0, 20.0, math.inf))

    running, num_units = [], 0
    for _ in range(rng.randint(1, 6)):
        num_computed, tier = rng.randint(1, 12), rng.choice((Tier.KV, Tier.HIDDEN))
        running.append(
            Row(
                num_computed,
                num_computed + rng.choice((1, 1, 1, 4)),
                tier,
                pending_seconds=rng.uniform(0.0, 4.0),
                miss_after_seconds=miss_after(),
                age_seconds=rng.uniform(4.0, 90.0),
                max_num_tokens=rng.randint(40, 400),
                expected_output_tokens=rng.randint(1, 300),
            )
        )
        num_units += num_computed * (2 if tier is Tier.KV else 1)
    waiting = [
        Row(
            0,
            rng.randint(1, 14),
            pending_seconds=rng.uniform(0.0, 10.0),
            miss_after_seconds=miss_after(),
            age_seconds=rng.uniform(0.0, 90.0),
            priority=rng.choice((0, 0, 0, 1)),
            expected_output_tokens=rng.randint(1, 30),
        )
        for _ in range(rng.randint(1, 8))
    ]
    return make_problem(
        running, waiting, num_units=num_units + rng.randint(6, 20), max_num_batched_tokens=32
    )


def as_values(decision: Decision | None) -> object:
    if decision is None:
        return None
    columns = (decision.slots, decision.num_tokens, decision.tiers, decision.preempted)
    return [column.tolist() for column in columns], decision.reason


def test_nobody_is_chosen_from_where_nobody_finds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [crowded_problem(random.Random(seed)) for seed in range(2000)]
    decided = [as_values(AptSloPolicy().decide(problem)) for problem in problems]
    num_stopped = 0
    may_start = _Round._may_start_one_of

    def count(made: _Round, rows: object) -> bool:
        nonlocal num_stopped
        num_stopped += not may_start(made, rows)  # type: ignore[arg-type]
        return True

    monkeypatch.setattr(_Round, "_may_start_one_of", count)
    assert [as_values(AptSloPolicy().decide(problem)) for problem in problems] == decided
    assert num_stopped > 50


def test_the_horizon_is_the_same_with_and_without_the_decision_before_it() -> None:
    num_asked = 0
    for seed in range(1000):
        problem, policy = crowded_problem(random.Random(seed)), AptSloPolicy()
        decision = policy.decide(problem)
        if decision is not None and decodes_all_running(problem, decision):
            num_asked += 1
            expected = AptSloPolicy().horizon(problem, decision)
            assert policy.horizon(problem, decision) == expected
    assert num_asked > 50
