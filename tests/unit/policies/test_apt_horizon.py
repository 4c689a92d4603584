"""What ``apt`` says about its next decodes, against those that it then decides."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.apt import AptPolicy
from aptserve_scheduler.policies.base import THIS_ITERATION, Horizon
from support.problems import ProblemBuilder, Row
from support.scheduler import make_cost

QUEUE = [Row(0, 90, max_num_tokens=100)]
"""One that never finds a place."""
UNITS = {Tier.KV: 2, Tier.HIDDEN: 1}


def builder(hidden_seconds: float, **changes: object) -> ProblemBuilder:
    """Tokens of a KV cache take 0.1 ms each, a decode at least 1 ms."""
    seconds = {Tier.KV: 1e-4, Tier.HIDDEN: hidden_seconds}
    cost = make_cost(base_seconds=1e-3, seconds_per_cached_token=seconds)
    return replace(ProblemBuilder(max_num_batched_tokens=64, cost=cost), **changes)


def decoding(num_cached: int, tier: Tier = Tier.KV, **changes: object) -> Row:
    """A running request with so many cached tokens, a token received just now."""
    values = {"pending_seconds": 0.0, "max_num_tokens": 29, **changes}
    return Row(num_cached, num_cached + 1, tier=tier, **values)  # type: ignore[arg-type]


def decide(problem: BatchProblem) -> tuple[Decision, Horizon]:
    """A decision, and how long it is to hold."""
    policy = AptPolicy()
    decision = policy.decide(problem)
    assert decision is not None
    return decision, policy.horizon(problem, decision)


def is_plain(problem: BatchProblem, decision: Decision) -> bool:
    """Whether it is a decode that changes no tier and takes nobody's memory."""
    tiers = dict(zip(problem.running.slots.tolist(), problem.running.tiers.tolist(), strict=True))
    return not len(decision.preempted) and all(
        tiers.get(slot) == tier
        for slot, tier in zip(decision.slots.tolist(), decision.tiers.tolist(), strict=True)
    )


def after_step(rows: list[Row], chosen: set[int], seconds: float) -> list[Row]:
    """The running requests once these have got a token."""
    return [
        replace(
            row,
            num_computed=row.num_computed + (slot in chosen),
            num_tokens=row.num_tokens + (slot in chosen),
            pending_seconds=seconds if slot in chosen else row.pending_seconds + seconds,
        )
        for slot, row in enumerate(rows)
    ]


def test_without_end_when_all_decode_in_kv_and_nobody_can_start() -> None:
    problem = builder(1e-3).build([decoding(10), decoding(12)], QUEUE)
    assert decide(problem)[1] == Horizon()


def test_not_beyond_this_iteration_when_somebody_waiting_has_a_place() -> None:
    queue = [Row(0, 3, pending_seconds=0.0)]
    running = [decoding(3, pending_seconds=5.0)]
    assert decide(builder(1e-3).build(running, queue))[1] == THIS_ITERATION


def test_not_beyond_this_iteration_when_a_promotion_may_fit() -> None:
    running = [decoding(20), decoding(3, Tier.HIDDEN)]
    assert decide(builder(1e-4, num_units=100).build(running, QUEUE))[1] == THIS_ITERATION


def members(problem: BatchProblem, horizon: Horizon, at: float, *new_tokens: int) -> list[int]:
    """Who decodes at a time, if these running requests had so many more tokens by then."""
    assert horizon.members is not None
    running = problem.running
    num_cached = running.num_computed_tokens + np.array(new_tokens)
    pending_since = np.where(num_cached > running.num_computed_tokens, at, problem.now)
    pending_since -= np.where(pending_since < at, running.pending_seconds, 0.0)
    chosen: list[int] = horizon.members(at, num_cached, pending_since).nonzero()[0].tolist()
    return chosen


def test_one_that_sits_out_decodes_once_it_is_worth_its_time() -> None:
    """U = 3, a cache of 9 tokens, 1 ms more for each: worth it after a wait of 27 ms."""
    running = [decoding(24), decoding(9, Tier.HIDDEN, pending_seconds=0.007)]
    problem = builder(1e-4 + 1e-3, num_units=61).build(running, QUEUE)
    decision, horizon = decide(problem)
    assert decision.slots.tolist() == [0]
    assert members(problem, horizon, problem.now + 0.0199, 2, 0) == [0]
    assert members(problem, horizon, problem.now + 0.0201, 2, 0) == [0, 1]


def test_one_that_runs_sits_out_once_it_has_a_token() -> None:
    running = [decoding(24), decoding(9, Tier.HIDDEN, pending_seconds=0.5)]
    problem = builder(1e-4 + 1e-3, num_units=61).build(running, QUEUE)
    decision, horizon = decide(problem)
    assert decision.slots.tolist() == [0, 1]
    assert members(problem, horizon, problem.now + 0.01, 1, 1) == [0]


def test_not_beyond_this_iteration_when_not_all_could_decode_at_once() -> None:
    running = [decoding(24), decoding(9, Tier.HIDDEN)]
    tight = builder(1.2e-4, num_units=61, max_num_batched_tokens=1)
    assert decide(tight.build(running, QUEUE))[1] == THIS_ITERATION


@pytest.mark.parametrize("seed", range(400))
def test_it_decides_as_it_said(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        decoding(
            rng.randint(4, 40),
            rng.choice((Tier.KV, Tier.HIDDEN, Tier.HIDDEN)),
            pending_seconds=rng.choice((0.0, 0.002, 0.01, 0.03, 2.0)),
            max_num_tokens=rng.choice((80, 300)),
            miss_after_seconds=rng.choice((0.1, 10.0)),
        )
        for _ in range(rng.randint(3, 8))
    ]
    # Just enough for the tokens of the next few iterations, so that promotions rarely fit.
    num_units = sum(UNITS[row.tier] * (row.num_computed // 4 + 1) for row in rows)
    world = builder(
        rng.choice((1.2e-4, 1.5e-4, 2e-4, 3e-4)),
        num_units=num_units + rng.randint(0, 6),
        block_size=4,
    )
    queue = QUEUE * rng.randint(0, 3)
    problem = world.build(rows, queue)
    decision, horizon = decide(problem)
    if not is_plain(problem, decision):
        return
    expected = set(decision.slots.tolist())
    for _ in range(1, int(min(horizon.num_iterations, 12))):
        seconds = rng.choice((1e-9, 1e-4, 0.003, 0.02))
        rows = after_step(rows, expected, seconds)
        world = replace(world, now=world.now + seconds)
        problem = world.build(rows, queue)
        if horizon.members is not None:
            running = problem.running
            since = world.now - running.pending_seconds
            mask = horizon.members(world.now, running.num_computed_tokens, since)
            expected = set(mask.nonzero()[0].tolist())
        num_grown = sum(
            UNITS[row.tier] * (row.num_computed % 4 == 0)
            for slot, row in enumerate(rows)
            if slot in expected
        )
        if not expected or problem.num_free_units < num_grown:
            return
        decision, _ = decide(problem)
        assert set(decision.slots.tolist()) == expected
        assert is_plain(problem, decision)
