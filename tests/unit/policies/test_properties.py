"""What holds for every policy there is, under random operations.

Arrivals of several tenants and priorities, cancels, failures, workers that come and are lost, any
pool size down to a block, any set of tiers, one to three plans in flight. Workers check every plan
for all of their limits; :class:`support.operations.Driver` recounts the books after each operation,
and at the end that each request ended once and nothing is held. That a policy which promises to
repeat itself does so is tested in ``tests/unit/scheduler_core/test_decode_run.py``.

``APTSERVE_LONG_TESTS=1`` runs 100,000 operations for each policy instead of 8,000.
"""

from __future__ import annotations

import os

import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import create_policy, policy_names
from support.operations import DEPTHS, HALF, TIER_SETS, Driver

CASES = [(tiers, depth) for tiers in TIER_SETS for depth in DEPTHS]
SEEDS = (1, 2)
NUM_OPERATIONS = 100_000 if os.environ.get("APTSERVE_LONG_TESTS") == "1" else 8_000


def num_operations(policy: str) -> int:
    """Operations of one case; a variant shares nearly all of its code with the policy itself."""
    share = 4 if ":" in policy else 1
    return NUM_OPERATIONS // (share * len(CASES) * len(SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("tiers", "depth"), CASES)
@pytest.mark.parametrize("policy", policy_names())
def test_limits_are_kept_and_each_request_ends_once(
    policy: str, tiers: str, depth: int, seed: int
) -> None:
    driver = Driver(seed, create_policy(policy), TIER_SETS[tiers], depth)
    driver.run(num_operations(policy))
    assert driver.plans


@pytest.mark.parametrize(("tiers", "depth"), CASES[::4])
@pytest.mark.parametrize("policy", policy_names())
def test_equal_events_give_equal_plans(policy: str, tiers: str, depth: int) -> None:
    first, second = (Driver(7, create_policy(policy), TIER_SETS[tiers], depth) for _ in range(2))
    first.run(120)
    second.run(120)
    assert first.plans
    assert first.plans == second.plans
    assert first.outcome == second.outcome


def test_random_operations_reach_preemption_promotion_and_both_tiers() -> None:
    seen = {"preempted": 0, "promoted": 0, Tier.KV: 0, Tier.HIDDEN: 0}
    for seed in range(3, 7):
        driver = Driver(seed, create_policy("apt"), HALF, 2)
        driver.run(300)
        for plan in driver.plans:
            seen["preempted"] += len(plan.preempted)
            seen["promoted"] += len(plan.promoted)
            for entry in plan.scheduled:
                seen[entry.tier] += 1
    assert all(seen.values()), seen
