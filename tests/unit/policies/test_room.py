"""Who gets memory, and who gives way for it."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.policies.base import Floats
from aptserve_scheduler.policies.room import Room
from support.problems import Row, make_problem

ON_TIME, LATE = 10.0, 0.5
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
    **changes: object,
) -> Room:
    """A pool of 58 units, 2 per token; ``growth`` of each in units."""
    problem = make_problem(rows, **changes)
    is_protected = np.isin(np.arange(len(rows)), protected)
    return Room(
        problem,
        np.full(len(rows), growth),
        problem.running.missed,
        is_protected,
        lambda: np.array(costs or [1.0] * len(rows)),
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


def test_costs_are_asked_for_only_once_somebody_live_must_give_way() -> None:
    def costs() -> Floats:
        raise AssertionError("not needed")

    problem = make_problem([running(29, LATE)])
    none = np.zeros(1, np.bool_)
    room = Room(problem, np.full(1, 2), problem.running.missed, none, costs)
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
