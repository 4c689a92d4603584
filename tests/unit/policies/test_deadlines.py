"""Whom to leave out so that as many as possible are in time."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from aptserve_scheduler.policies.deadlines import first_fits, keep_most


def kept(demands: list[float], supplies: list[float]) -> list[int]:
    """Rows kept of one resource, whose costs are its demands."""
    row = np.array([demands], np.float64)
    return np.flatnonzero(keep_most(row, np.array([supplies], np.float64), row)).tolist()


def most_in_time(demands: list[int], supplies: list[int]) -> int:
    """Size of the largest subset that is in time, by trying them all."""
    rows = range(len(demands))
    for num in reversed(range(len(demands) + 1)):
        for subset in combinations(rows, num):
            used = np.cumsum([demands[row] for row in subset])
            if all(used <= [supplies[row] for row in subset]):
                return num
    raise AssertionError("nobody is always in time")


@pytest.mark.parametrize("seed", range(60))
def test_one_resource_is_shared_as_well_as_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 9))
    demands = rng.integers(1, 10, num).tolist()
    supplies = np.sort(rng.integers(0, 6 * num, num)).tolist()
    chosen = kept(demands, supplies)
    used = np.cumsum([demands[row] for row in chosen])
    assert all(used <= [supplies[row] for row in chosen])
    assert len(chosen) == most_in_time(demands, supplies)


def test_the_costliest_so_far_is_left_out_and_of_equal_ones_the_first() -> None:
    assert kept([5, 1, 3, 3], [9, 9, 9, 9]) == [1, 2, 3]
    assert kept([3, 3, 3], [6, 6, 6]) == [1, 2]


def test_a_later_request_cannot_save_an_earlier_one() -> None:
    assert kept([9, 1], [5, 20]) == [1]
    assert kept([2, 9], [5, 5]) == [0]


def test_no_supply_at_all_leaves_out_everybody() -> None:
    assert kept([1, 1], [-1, 0]) == []


@pytest.mark.parametrize("seed", range(60))
def test_one_resource_alone_is_shared_as_among_several(seed: int) -> None:
    """Counted twice, a resource takes the way for several, and leaves out the same."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 60))
    demands = rng.uniform(0.0, 10.0, num) * rng.integers(0, 2, num)
    supplies = rng.uniform(-1.0, 2.0 * num, num)
    costs = rng.integers(0, 20, num).astype(np.float64)
    alone = keep_most([demands], [supplies], [costs])
    twice = keep_most([demands] * 2, [supplies] * 2, [costs] * 2)
    assert alone.tolist() == twice.tolist()


def test_each_resource_leaves_out_by_its_own_costs() -> None:
    memory, time = [4.0, 1.0, 1.0], [1.0, 5.0, 1.0]
    demands = np.array([memory, time])
    plenty, scarce = np.full(3, 100.0), np.full(3, 3.0)
    in_memory = keep_most(demands, np.stack([scarce, plenty]), demands)
    in_time = keep_most(demands, np.stack([plenty, scarce]), demands)
    assert in_memory.tolist() == [False, True, True]
    assert in_time.tolist() == [True, False, True]


def test_who_is_left_out_for_one_resource_gives_back_the_others() -> None:
    demands = np.array([[4.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    supplies = np.array([[3.0] * 3, [6.0] * 3])
    assert keep_most(demands, supplies, demands).tolist() == [False, True, True]


def test_nobody_is_no_problem() -> None:
    nothing = np.zeros((2, 0))
    assert keep_most(nothing, nothing, nothing).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_each_in_turn_takes_its_size_if_it_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, room = rng.integers(1, 12, 15), int(rng.integers(-1, 50))
    left, expected = room, []
    for size in sizes.tolist():
        expected.append(size <= left)
        left -= size if size <= left else 0
    assert first_fits(sizes, room).tolist() == expected
