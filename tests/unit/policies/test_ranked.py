"""Batches by rank: who is served, who sits out and who loses its memory."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from aptserve_scheduler.policies import Decision
from aptserve_scheduler.policies.ranked import Everyone, FirstInLine, ranked_batch
from support.problems import Row, make_problem

WIDE = {"num_units": 1000, "max_num_batched_tokens": 64}


def batch(
    running: list[tuple[int, Row]], waiting: list[tuple[int, Row]], **changes: object
) -> Decision:
    """The batch of requests given with their levels."""
    problem = make_problem(
        [row for _, row in running], [row for _, row in waiting], **{**WIDE, **changes}
    )
    levels = np.array([level for level, _ in [*running, *waiting]])
    decision = ranked_batch(problem, Everyone(problem), levels)
    assert decision is not None
    return decision


def chosen(decision: Decision) -> dict[int, int]:
    return dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))


HOLDS_TEN = Row(9, 10)  # 18 units, 20 after a decode


def test_everyone_is_who_runs_and_then_who_waits() -> None:
    everyone = Everyone(make_problem([HOLDS_TEN, Row(2, 3)], [Row(0, 7, age_seconds=0.5)]))
    assert len(everyone) == 3
    assert everyone.slots.tolist() == [0, 1, 2]
    assert everyone.num_remaining_tokens.tolist() == [1, 1, 7]
    assert everyone.age_seconds.tolist() == [1.0, 1.0, 0.5]


def test_tokens_go_to_the_lowest_levels_and_the_others_sit_out() -> None:
    decision = batch([(2, HOLDS_TEN), (0, HOLDS_TEN)], [(1, Row(0, 63))])
    assert list(chosen(decision).items()) == [(1, 1), (2, 63)]
    assert not len(decision.preempted)
    assert decision.reason.startswith("by rank: 1 of 2 running requests and 1 of 1 waiting ones")


def test_the_lowest_rank_loses_its_memory_and_no_more_than_must() -> None:
    running = [(3, HOLDS_TEN), (4, HOLDS_TEN), (1, HOLDS_TEN)]  # 54 of 70 units
    decision = batch(running, [(0, Row(0, 8))], num_units=70)
    assert chosen(decision) == {3: 8, 2: 1, 0: 1}
    assert decision.preempted.tolist() == [1]


def test_nobody_is_preempted_for_a_lower_rank() -> None:
    decision = batch([(0, HOLDS_TEN), (1, HOLDS_TEN)], [(2, Row(0, 10))], num_units=58)
    assert chosen(decision) == {0: 1, 1: 1}
    assert not len(decision.preempted)


def test_a_request_that_cannot_fit_holds_back_those_who_wait_behind_it() -> None:
    running = [(0, HOLDS_TEN), (2, Row(2, 3))]
    decision = batch(running, [(1, Row(0, 20)), (3, Row(0, 1))], num_units=58)
    assert chosen(decision) == {0: 1, 1: 1}
    assert not len(decision.preempted)


def test_seats_are_taken_from_the_lowest_rank() -> None:
    running = [(2, HOLDS_TEN), (1, HOLDS_TEN)]
    decision = batch(running, [(0, Row(0, 4)), (3, Row(0, 4))], max_num_seqs=2)
    assert chosen(decision) == {2: 4, 1: 1}
    assert decision.preempted.tolist() == [0]


def test_requests_whose_end_is_in_flight_keep_memory_and_seat() -> None:
    ending = Row(num_computed=28, num_tokens=29, schedulable=False)
    decision = batch([(5, ending)], [(0, Row(0, 4)), (0, Row(0, 4))], max_num_seqs=2)
    assert chosen(decision) == {1: 4}
    problem = make_problem([ending, Row(1, 2)], num_units=58)
    assert ranked_batch(problem, Everyone(problem), np.zeros(2, np.int64)) is None


def test_small_ones_stay_where_a_large_one_must_go() -> None:
    running = [(1, Row(20, 21)), (2, Row(5, 6)), (3, Row(4, 5))]  # 58 units
    decision = batch(running, [(0, Row(0, 17))], num_units=58)
    assert chosen(decision) == {3: 17, 1: 1, 2: 1}
    assert decision.preempted.tolist() == [0]


def test_all_that_stand_in_the_way_go_however_many() -> None:
    rng = np.random.default_rng(3)
    running = [(1, Row(int(n), int(n) + 1)) for n in rng.integers(1, 9, 60)]
    num_units = 2 * sum(row.num_computed for _, row in running)
    decision = batch(
        running, [(0, Row(0, 40))], num_units=num_units, max_num_seqs=99, max_num_batched_tokens=99
    )
    held = {slot: 2 * row.num_computed for slot, (_, row) in enumerate(running)}
    lost = [held[slot] for slot in decision.preempted.tolist()]
    left = sum(lost) - 80 - 2 * (len(decision.slots) - 1)
    assert chosen(decision)[60] == 40
    assert 0 <= left < min(lost) + 2  # none of them could have had its next token


# Decodes of all who run, beside somebody who waits


def first_in_line(
    running: list[Row], waiting: list[tuple[int, Row]], **changes: object
) -> FirstInLine:
    problem = make_problem(running, [row for _, row in waiting], **{**WIDE, **changes})
    return FirstInLine.of(problem, np.array([level for level, _ in waiting]))


@pytest.mark.parametrize(
    ("num_tokens", "moment"), [(5, 3.0), (10, 3.0), (11, 5.0), (20, 5.0), (21, 8.0), (31, inf)]
)
def test_the_first_in_line_fits_once_enough_memory_is_behind_it(
    num_tokens: int, moment: float
) -> None:
    waiting = [(0, Row(0, num_tokens)), (0, Row(0, 1))]
    first = first_in_line([HOLDS_TEN] * 3, waiting, num_units=60)
    assert first.fits_at(np.array([8.0, 3.0, 5.0])) == moment


def test_new_requests_leave_some_memory_free() -> None:
    falls_behind = np.array([8.0, 3.0])
    first = first_in_line([HOLDS_TEN] * 2, [(0, Row(0, 90))], num_units=200)
    assert first.fits_at(falls_behind) == 8.0  # 2 units are left free, 178 are there at first
    first = first_in_line([HOLDS_TEN] * 2, [(0, Row(0, 89))], num_units=200)
    assert first.fits_at(falls_behind) == 3.0


def test_the_first_in_line_needs_a_seat_too() -> None:
    first = first_in_line([HOLDS_TEN] * 3, [(0, Row(0, 1))], max_num_seqs=3)
    assert first.fits_at(np.array([8.0, 3.0, inf])) == 3.0


def test_who_is_behind_the_first_in_line() -> None:
    running = [Row(9, 10, age_seconds=age) for age in (3.0, 2.0, 1.0)]
    waiting = [(4, Row(0, 9, age_seconds=4.0)), (2, Row(0, 9, age_seconds=2.0))]
    assert first_in_line(running, waiting).levels_behind().tolist() == [3, 3, 2]


def test_who_comes_first_on_the_way_to_lower_levels() -> None:
    waiting = [(level, Row(0, 9)) for level in (4, 3, 2, 2, 3)]
    first = first_in_line([], waiting)
    assert first.overtakers(np.array([4, 3, 2, 2, 3])).tolist() == []
    assert first.overtakers(np.array([3, 2, 1, 1, 2])).tolist() == [1, 2, 3]
    assert first.overtakers(np.zeros(5, np.int64)).tolist() == [0, 1, 2, 3, 4]
