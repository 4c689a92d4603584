"""Who gets memory, and who gives way for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aptserve_scheduler.policies.room import Room
from support.problems import Row, make_problem

ON_TIME, LATE, CAN_PAUSE = 10.0, 0.5, math.inf
"""After how many seconds a request that has waited for one misses."""


def running(num_computed: int, miss_after: float = ON_TIME, *, schedulable: bool = True) -> Row:
    return Row(
        num_computed, num_computed + 1, miss_after_seconds=miss_after, schedulable=schedulable
    )


def make_room(
    rows: list[Row],
    *,
    growth: int = 0,
    costs: list[float] | None = None,
    protected: tuple[int, ...] = (),
    pays: list[bool] | None = None,
    **changes: object,
) -> Room:
    """A pool of 58 units, 2 per token; ``growth`` of each in units."""
    problem = make_problem(rows, **changes)
    return Room(
        problem,
        np.full(len(rows), growth),
        late=problem.running.missed,
        can_pause=np.isinf(problem.running.miss_after_seconds),
        protected=np.isin(np.arange(len(rows)), protected),
        costs=lambda: np.array(costs or [1.0] * len(rows)),
        pays=lambda: np.array(pays or [True] * len(rows)),
    )


def gone(room: Room) -> list[int]:
    return np.flatnonzero(room.gives_way).tolist()


def test_growth_is_taken_from_what_is_free() -> None:
    room = make_room([running(5), running(5)], growth=2)
    assert room.fit_growth()
    assert (room.num_free, room.num_seats, gone(room)) == (58 - 20 - 4, 6, [])


def test_growth_makes_the_late_give_way_first_and_of_them_the_latest() -> None:
    rows = [running(7), running(7, LATE), running(7, LATE), running(8)]
    room = make_room(rows, growth=2, costs=[9.0, 1.0, 1.0, 1.0])
    assert room.fit_growth()
    assert gone(room) == [2]
    assert room.num_free == 16 - 8


def test_then_the_costliest_of_the_live_give_way() -> None:
    rows = [running(10), running(9), running(10)]
    room = make_room(rows, growth=2, costs=[2.0, 3.0, 1.0])
    assert room.fit_growth()
    assert gone(room) == [1]


@pytest.mark.parametrize(("growth", "expected"), [(2, [3]), (9, [2, 3]), (15, [1, 2, 3])])
def test_those_that_can_pause_do_so_after_the_late_and_before_the_other_live(
    growth: int, expected: list[int]
) -> None:
    rows = [running(5), running(10, CAN_PAUSE), running(6, CAN_PAUSE), running(7, LATE)]
    room = make_room(rows, growth=growth, costs=[9.0, 1.0, 2.0, 1.0])
    assert room.fit_growth()
    assert gone(room) == expected


def test_costs_are_asked_for_only_once_somebody_live_must_give_way() -> None:
    def unneeded() -> Any:
        raise AssertionError("not needed")

    problem = make_problem([running(20, LATE), running(9)])
    none = np.zeros(2, np.bool_)
    late = problem.running.missed
    room = Room(
        problem,
        np.full(2, 2),
        late=late,
        can_pause=none,
        protected=none,
        costs=unneeded,
        pays=unneeded,
    )
    assert room.fit_growth()
    assert gone(room) == [0]


def test_neither_the_protected_nor_those_whose_end_is_in_flight_give_way() -> None:
    rows = [running(10, LATE), running(19, LATE, schedulable=False)]
    room = make_room(rows, growth=2, protected=(0,))
    assert not room.fit_growth()
    assert gone(room) == []


@pytest.mark.parametrize(
    ("num_units", "from_late", "from_live", "expected"),
    [
        (18, False, False, []),
        (19, False, False, None),
        (19, True, False, [1]),
        (39, True, False, None),
        (39, True, True, [1, 2]),
        (58, True, True, [0, 1, 2]),
        (59, True, True, None),
    ],
)
def test_memory_comes_from_those_it_may_come_from(
    num_units: int, from_late: bool, from_live: bool, expected: list[int] | None
) -> None:
    room = make_room([running(5), running(10, LATE), running(5)], costs=[1.0, 0.0, 2.0])
    assert (room.num_free, room.num_reachable) == (18, 38)
    is_taken = room.take(num_units, from_late=from_late, from_live=from_live)
    assert is_taken == (expected is not None)
    assert gone(room) == (expected or [])
    if not is_taken:
        assert (room.num_free, room.num_seats) == (18, 5)


def test_a_seat_is_needed_too() -> None:
    room = make_room([running(2), running(2, LATE)], max_num_seqs=2)
    assert not room.take(1)
    assert room.take(1, from_late=True)
    assert gone(room) == [1]
    assert not room.has_late
    assert not room.take(1, from_late=True)
    assert room.take(1, from_late=True, from_live=True)
    assert (gone(room), room.num_seats) == ([0, 1], 0)


PAUSABLE = [running(4, CAN_PAUSE), running(5, CAN_PAUSE), running(6), running(7, LATE)]


@pytest.mark.parametrize(
    ("num_units", "expected"), [(1, [1]), (10, [1]), (11, [0, 1]), (18, [0, 1]), (19, None)]
)
def test_a_place_by_pausing_takes_nothing_but_what_the_paused_held(
    num_units: int, expected: list[int] | None
) -> None:
    room = make_room(PAUSABLE, costs=[1.0, 2.0, 9.0, 9.0])
    free, seats = room.num_free, room.num_seats
    assert room.take_by_pausing(num_units) == (expected is not None)
    assert gone(room) == (expected or [])
    released = 2 * sum((4, 5)[row] for row in expected or [])
    assert room.num_free == free + released - (num_units if expected else 0)
    assert room.num_free >= free
    assert room.num_seats == seats + len(expected or []) - bool(expected)


def test_a_place_by_pausing_needs_no_free_seat() -> None:
    room = make_room(PAUSABLE, max_num_seqs=4)
    assert room.take_by_pausing(8)
    assert room.num_seats == 0


def test_the_protected_are_not_paused() -> None:
    room = make_room(PAUSABLE, protected=(0,))
    assert not room.take_by_pausing(11)
    assert room.take_by_pausing(10)
    assert gone(room) == [1]


def test_who_can_pause_gives_way_to_the_line_before_the_other_live() -> None:
    room = make_room(PAUSABLE, costs=[1.0, 2.0, 9.0, 1.0])
    assert room.take(14 + 14 + 18, from_late=True, from_live=True)
    assert gone(room) == [0, 1, 3]


@pytest.mark.parametrize(("num_units", "expected"), [(8, [0]), (9, None)])
def test_nobody_is_paused_whose_pause_does_not_pay(
    num_units: int, expected: list[int] | None
) -> None:
    room = make_room(PAUSABLE, pays=[True, False, True, True])
    assert room.take_by_pausing(num_units) == (expected is not None)
    assert gone(room) == (expected or [])


def test_but_those_do_give_way_to_growth() -> None:
    room = make_room([running(14, CAN_PAUSE), running(14)], growth=2, pays=[False, False])
    assert room.fit_growth()
    assert gone(room) == [0]
