"""The exact solver against trying everything, and what it does when it must stop early."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from aptserve_scheduler.policies.branch_and_bound import MissingSolverError
from aptserve_scheduler.policies.exact import ExactConfig, solve
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack
from aptserve_scheduler.policies.greedy import solve as solve_greedily

BRANCH_AND_BOUND_ALONE = ExactConfig(max_cells=1)


def best_by_trying_everything(knapsack: Knapsack) -> float:
    num_options, num_requests = knapsack.values.shape
    best = 0.0
    for options in itertools.product(range(NOT_CHOSEN, num_options), repeat=num_requests):
        choice = np.array(options, np.int64)
        if knapsack.fits(choice):
            best = max(best, knapsack.worth(choice))
    return best


def random_knapsack(seed: int, num_limits: int) -> Knapsack:
    """Up to 6 requests with up to 3 options; some options are worthless, some requests missed."""
    rng = np.random.default_rng(seed)
    num_options = int(rng.integers(1, 4))
    shape = (num_options, int(rng.integers(1, 7 if num_options < 3 else 6)))
    units = np.cumsum(rng.integers(1, 9, shape), axis=0)
    tokens = np.broadcast_to(rng.integers(1, 12, shape[1]), shape)
    seats = np.broadcast_to(np.ones((), np.int64), shape)
    values = rng.random(shape) * np.where(rng.random(shape[1]) < 0.3, 1e-6, 1.0)
    values[rng.random(shape) < 0.15] = -np.inf
    values[rng.random(shape) < 0.1] = -0.5
    capacity = (int(rng.integers(3, 40)), int(rng.integers(3, 40)), int(rng.integers(1, 5)))
    needs = (units, tokens, seats)
    return Knapsack(values, needs[:num_limits], capacity[:num_limits])


@pytest.mark.parametrize("config", [ExactConfig(), BRANCH_AND_BOUND_ALONE], ids=["any", "bnb"])
@pytest.mark.parametrize("num_limits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(15))
def test_nothing_is_better(seed: int, num_limits: int, config: ExactConfig) -> None:
    knapsack = random_knapsack(100 * num_limits + seed, num_limits)
    solution = solve(knapsack, config)
    assert solution.is_optimal
    assert knapsack.fits(solution.choice)
    assert knapsack.worth(solution.choice) == pytest.approx(
        best_by_trying_everything(knapsack), rel=1e-9
    )


@pytest.mark.parametrize("seed", range(10))
def test_both_ways_agree_where_units_alone_bind(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = np.cumsum(2 * rng.integers(1, 20, (2, 60)), axis=0)
    knapsack = Knapsack(rng.random((2, 60)), (units,), (int(units[0].sum() * 0.4),))
    worth = [
        knapsack.worth(solve(knapsack, config).choice)
        for config in (ExactConfig(), BRANCH_AND_BOUND_ALONE)
    ]
    assert worth[0] == pytest.approx(worth[1], rel=1e-9)


def hard_knapsack(num_requests: int = 40) -> Knapsack:
    """Values close to sizes, and three limits that all bind: the greedy is not the optimum."""
    rng = np.random.default_rng(3)
    units, tokens = rng.integers(50, 150, (2, 1, num_requests))
    values = units + tokens + rng.random(units.shape)
    limits = (25 * num_requests, 25 * num_requests + 3, num_requests // 3)
    return Knapsack(values, (units, tokens, np.ones_like(units)), limits)


def test_search_that_reaches_its_limits_is_never_worse_than_the_greedy() -> None:
    knapsack = hard_knapsack()
    greedy = knapsack.worth(solve_greedily(knapsack))
    stopped = solve(knapsack, ExactConfig(time_limit_seconds=1e-9))
    assert not stopped.is_optimal
    assert knapsack.fits(stopped.choice)
    assert knapsack.worth(stopped.choice) >= greedy


def test_equal_knapsacks_have_equal_answers() -> None:
    first, second = (solve(hard_knapsack(16), ExactConfig(max_nodes=3)) for _ in range(2))
    assert first.choice.tolist() == second.choice.tolist()
    assert first.is_optimal == second.is_optimal


def test_everybody_where_there_is_room() -> None:
    values = np.array([[1.0, 2.0, -1.0], [3.0, 1.0, -2.0]])
    units = np.array([[1, 1, 1], [2, 2, 2]])
    assert solve(Knapsack(values, (units,), (9,))).choice.tolist() == [1, 0, NOT_CHOSEN]


def test_no_request_and_none_that_fits() -> None:
    assert solve(Knapsack(np.zeros((1, 0)), (np.zeros((1, 0), np.int64),), (5,))).is_optimal
    one = Knapsack(np.ones((1, 1)), (np.full((1, 1), 6),), (5,))
    assert solve(one).choice.tolist() == [NOT_CHOSEN]


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingSolverError, match="'simulate'"):
        solve(hard_knapsack(), BRANCH_AND_BOUND_ALONE)


@pytest.mark.parametrize(
    ("field", "value"), [("time_limit_seconds", 0.0), ("max_nodes", 0), ("max_cells", 0)]
)
def test_bad_settings_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        ExactConfig(**{field: value})  # type: ignore[arg-type]
