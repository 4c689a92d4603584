"""The paper's policy with an exact solver: better where the greedy misses, otherwise the same."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import create_policy
from aptserve_scheduler.policies.branch_and_bound import MissingSolverError
from aptserve_scheduler.policies.exact import ExactConfig
from aptserve_scheduler.policies.optimal import OptimalPolicy
from support.problems import Row, make_problem
from support.scheduler import KV, make_cost

KV_ALONE = {"tiers": (KV,), "num_units": 20, "max_num_batched_tokens": 64}


def prompt(num_tokens: int, pending: float, **changes: object) -> Row:
    fields = {"pending_seconds": pending, "max_num_tokens": num_tokens + 1}
    return Row(0, num_tokens, **{**fields, **changes})  # type: ignore[arg-type]


MISSED_BY_THE_GREEDY = [prompt(5, 3.1), prompt(4, 2.5), prompt(4, 2.5)]
"""12, 10 and 10 of 20 units, falling in value per unit: the two of 10 are worth more."""


def test_what_the_greedy_misses() -> None:
    problem = make_problem([], MISSED_BY_THE_GREEDY, **KV_ALONE)
    slots = {}
    for name in ("apt", "optimal"):
        decision = create_policy(name).decide(problem)
        assert decision is not None
        slots[name] = decision.slots.tolist()
    assert slots == {"apt": [0], "optimal": [1, 2]}


def test_a_search_that_was_given_up_says_so() -> None:
    config = ExactConfig(max_cells=1, time_limit_seconds=1e-9)
    decision = OptimalPolicy(config).decide(make_problem([], MISSED_BY_THE_GREEDY, **KV_ALONE))
    assert decision is not None
    assert decision.reason.endswith("; not proven optimal within the search limits")


def test_without_scipy_the_policy_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingSolverError, match="'simulate'"):
        create_policy("optimal")


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_apt_where_there_is_room_for_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dear = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 1e-3})
    running = [Row(n, n + 1, max_num_tokens=40) for n in rng.integers(2, 12, 4).tolist()]
    waiting = [prompt(n, float(rng.random())) for n in rng.integers(2, 9, 4).tolist()]
    problem = make_problem(running, waiting, num_units=400, max_num_batched_tokens=64, cost=dear)
    apt, optimal = (create_policy(name).decide(problem) for name in ("apt", "optimal"))
    assert apt is not None
    assert optimal is not None
    assert apt.reason == optimal.reason
    for field in ("slots", "num_tokens", "tiers", "preempted"):
        assert getattr(apt, field).tolist() == getattr(optimal, field).tolist()
