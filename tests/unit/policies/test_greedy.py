"""The greedy against the exact optimum, and the rules it must keep."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.policies.exact import solve as solve_exactly
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack, solve
from hypothesis import given, settings
from hypothesis import strategies as st


def make_knapsack(
    values: list[list[float]],
    units: list[list[int]],
    capacity: int,
    *more: tuple[list[list[int]], int],
) -> Knapsack:
    """Requests as rows here; ``more`` are further resources with their limits."""
    needs = [np.array(rows, np.int64).T for rows in (units, *(need for need, _ in more))]
    return Knapsack(
        np.array(values, np.float64).T,
        tuple(needs),
        (capacity, *(limit for _, limit in more)),
    )


def best_worth(knapsack: Knapsack) -> float:
    """Worth of the optimum."""
    solution = solve_exactly(knapsack)
    assert solution.is_optimal
    return knapsack.worth(solution.choice)


def random_knapsack(rng: np.random.Generator) -> Knapsack:
    """A small instance with one to three options per request."""
    num_requests, num_options = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    shape = (num_options, num_requests)
    units = np.cumsum(rng.integers(1, 12, shape), axis=0)
    values = rng.random(shape) * rng.choice([1, 10], shape)
    values[rng.random(shape) < 0.15] = -np.inf
    return Knapsack(values, (units,), (int(rng.integers(5, 120)),))


def test_random_instances_are_near_the_optimum() -> None:
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(400):
        knapsack = random_knapsack(rng)
        choice, best = solve(knapsack), best_worth(knapsack)
        assert knapsack.fits(choice)
        ratios.append(knapsack.worth(choice) / best if best else 1.0)
    assert min(ratios) >= 0.5
    assert float(np.mean(ratios)) >= 0.98


def test_three_binding_limits_keep_half_but_cost_more() -> None:
    """The greedy looks at units alone: where tokens and seats bind too, it leaves more behind."""
    rng = np.random.default_rng(6)
    ratios = []
    for _ in range(40):
        shape = (2, 12)
        units = np.cumsum(rng.integers(1, 12, shape), axis=0)
        tokens = np.broadcast_to(rng.integers(1, 60, shape[1]), shape)
        seats = np.broadcast_to(np.ones((), np.int64), shape)
        values = rng.random(shape) + np.array([[0.0], [0.2]])
        knapsack = Knapsack(values, (units, tokens, seats), (30, 130, 5))
        ratios.append(knapsack.worth(solve(knapsack)) / best_worth(knapsack))
    assert min(ratios) >= 0.5
    assert 0.8 <= float(np.mean(ratios)) <= 0.98


@pytest.mark.parametrize("capacity", [10, 100, 1000])
def test_double_check_keeps_the_factor_2_with_one_huge_request(capacity: int) -> None:
    """The classic trap: greedy takes value 2 in 1 unit and has no room for value ``capacity``."""
    knapsack = make_knapsack([[2.0], [float(capacity)]], [[1], [capacity]], capacity)
    assert solve(knapsack).tolist() == [NOT_CHOSEN, 0]


@pytest.mark.parametrize("seed", range(20))
def test_adversarial_sizes_keep_the_bound(seed: int) -> None:
    """Requests a little over half the pool beside a few that are slightly more efficient."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(20, 200))
    half = capacity // 2 + 1
    units = [[half + int(rng.integers(0, 3))] for _ in range(5)]
    units += [[int(rng.integers(1, 4))] for _ in range(3)] + [[capacity]]
    values = [[row[0] * (1 + 0.01 * float(rng.random()))] for row in units]
    knapsack = make_knapsack(values, units, capacity)
    assert knapsack.worth(solve(knapsack)) >= 0.5 * best_worth(knapsack)


def test_goes_on_past_a_request_that_does_not_fit() -> None:
    knapsack = make_knapsack([[30.0], [20.0], [4.0]], [[6], [5], [4]], 10)
    assert solve(knapsack).tolist() == [0, NOT_CHOSEN, 0]


def test_no_upgrade_before_its_own_base() -> None:
    """The base of request 1 does not fit, its smaller upgrade step alone would."""
    knapsack = make_knapsack([[50.0, -np.inf], [40.0, 44.0]], [[6, 7], [5, 6]], 10)
    assert solve(knapsack).tolist() == [0, NOT_CHOSEN]


def test_option_off_the_hull_is_skipped() -> None:
    """The paper's rule: no hidden when it is worth less than half of KV."""
    other = [50.0, -np.inf]  # takes 2 of the 3 units
    below = make_knapsack([other, [4.9, 10.0]], [[2, 3], [1, 2]], 3)
    above = make_knapsack([other, [5.1, 10.0]], [[2, 3], [1, 2]], 3)
    assert solve(below).tolist() == [0, NOT_CHOSEN]
    assert solve(above).tolist() == [0, 0]


def test_worthless_and_oversized_options_are_never_chosen() -> None:
    assert solve(make_knapsack([[0.0], [-3.0]], [[1], [1]], 10)).tolist() == [NOT_CHOSEN] * 2
    assert solve(make_knapsack([[9.0], [1.0]], [[11], [10]], 10)).tolist() == [NOT_CHOSEN, 0]


def test_no_request_gives_no_choice() -> None:
    knapsack = Knapsack(np.zeros((2, 0)), (np.zeros((2, 0), np.int64),), (5,))
    assert solve(knapsack).tolist() == []


def test_equal_requests_are_taken_in_order() -> None:
    knapsack = make_knapsack([[1.0]] * 5, [[2]] * 5, 7)
    assert solve(knapsack).tolist() == [0, 0, 0, NOT_CHOSEN, NOT_CHOSEN]


def test_a_request_over_the_token_budget_does_not_empty_the_batch() -> None:
    """The best candidate exceeds the budget; the released code then schedules nobody."""
    tokens = [[100], [10], [10]]
    knapsack = make_knapsack([[9.0], [1.0], [1.0]], [[1], [1], [1]], 10, (tokens, 50))
    assert solve(knapsack).tolist() == [NOT_CHOSEN, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(500, 1500))
def test_many_requests_under_many_limits(seed: int, num_requests: int) -> None:
    """Above the chunk size: within every limit, and nobody who still fits is left out."""
    rng = np.random.default_rng(seed)
    shape = (2, num_requests)
    units = np.cumsum(rng.integers(1, 40, shape), axis=0)
    tokens = np.broadcast_to(rng.integers(1, 50, num_requests), shape)
    seats = np.broadcast_to(np.ones((), np.int64), shape)
    capacity = tuple(int(rng.integers(1, bound)) for bound in (8000, 8000, 600))
    values = np.round(rng.random(shape) * 100) + np.array([[1.0], [3.0]])
    knapsack = Knapsack(values, (units, tokens, seats), capacity)
    choice = solve(knapsack)
    assert knapsack.fits(choice)
    chosen = np.flatnonzero(choice != NOT_CHOSEN)
    left = [
        limit - int(need[choice[chosen], chosen].sum())
        for need, limit in zip(knapsack.needs, capacity, strict=True)
    ]
    others = np.flatnonzero(choice == NOT_CHOSEN)
    # A request whose hull starts at its larger option may be left out for want of that alone.
    starts_small = values[0, others] / units[0, others] >= values[1, others] / units[1, others]
    fits = np.ones(len(others), np.bool_)
    for need, have in zip(knapsack.needs, left, strict=True):
        fits &= need[0, others] <= have
    assert len(chosen) == 1 or not np.any(fits & starts_small)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_chunks_change_nothing(seed: int) -> None:
    """Sorting a few increments at a time gives the choice of sorting all."""
    rng = np.random.default_rng(seed)
    knapsack = random_knapsack(rng)
    module = __import__("aptserve_scheduler.policies.greedy", fromlist=["solve"])
    whole = solve(knapsack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 3)
        patch.setattr(module, "_ONE_BY_ONE", 2)
        assert solve(knapsack).tolist() == whole.tolist()


def test_the_request_behind_a_full_chunk_is_compared_too() -> None:
    """A chunk fills the pool exactly; the huge request that did not fit comes right after it."""
    module = __import__("aptserve_scheduler.policies.greedy", fromlist=["solve"])
    values = [[1.0]] * 3 + [[29.0]] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 3)
        choice = solve(make_knapsack(values, [[1]] * 3 + [[30]] * 2, 30))
    assert choice.tolist() == [NOT_CHOSEN] * 3 + [0, NOT_CHOSEN]
