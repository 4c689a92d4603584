"""Which requests to serve when not all can meet their deadlines.

On one machine, the fewest jobs are late when they run in the order of their deadlines and, each
time the next one would be late, the longest job so far is left out (Moore 1968). Here several
resources are due by each deadline, time and memory; the one that runs out first decides by whose
costs somebody is left out, so the result is a good one and not proven to be the best.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from aptserve_scheduler.policies.base import Bools, Floats, Ints
from aptserve_scheduler.policies.common import indices


class _Costliest:
    """The costliest of the requests seen so far; of equal ones the first."""

    def __init__(self, costs: Floats) -> None:
        by_cost = np.argsort(-costs, kind="stable")
        ranks = np.empty(len(by_cost), np.int64)
        ranks[by_cost] = np.arange(len(by_cost))
        self._by_cost: list[int] = by_cost.tolist()
        self._ranks: list[int] = ranks.tolist()
        self._heap: list[int] = []
        self._num_seen = 0

    def pop(self, row: int) -> int | None:
        """The costliest up to this row that was not popped yet; ``None``: all were."""
        for rank in self._ranks[self._num_seen : row + 1]:
            heappush(self._heap, rank)
        self._num_seen = row + 1
        return self._by_cost[heappop(self._heap)] if self._heap else None


def keep_most(demands: Floats, supplies: Floats, costs: Floats) -> Bools:
    """Keep as many of n requests, in order of deadline, as k resources allow.

    ``demands`` [k, n], not negative: what each request needs; ``supplies`` [k, n]: what there is,
    until its deadline, for it and all kept before it; ``costs`` [k, n]: when resource k runs short,
    the most costly so far is left out first. Returns [n] who is kept.
    """
    kept = np.ones(demands.shape[1], np.bool_)
    totals = np.cumsum(demands, axis=1)
    is_short = totals > supplies
    # What suffices for everybody suffices for those who are kept.
    scarce = is_short.any(axis=1)
    if not scarce.any():
        return kept
    first = int(is_short.any(axis=0).argmax())
    used: list[float] = (totals[scarce, first] - demands[scarce, first]).tolist()
    needs: list[list[float]] = demands[scarce].T.tolist()
    limits: list[list[float]] = supplies[scarce].T.tolist()
    costliest = [_Costliest(row) for row in costs[scarce]]
    for row in range(first, len(needs)):
        for resource, need in enumerate(needs[row]):
            used[resource] += need
        for resource, limit in enumerate(limits[row]):
            while used[resource] > limit and (out := costliest[resource].pop(row)) is not None:
                if kept[out]:
                    kept[out] = False
                    for other, need in enumerate(needs[out]):
                        used[other] -= need
    return kept


def first_fits(sizes: Ints, room: int) -> Bools:
    """[n] who gets in when each in turn takes its size if it still fits."""
    taken = np.zeros(len(sizes), np.bool_)
    rows = indices(sizes <= room)
    while len(rows):
        total = np.cumsum(sizes[rows])
        num = int(np.searchsorted(total, room, side="right"))
        taken[rows[:num]] = True
        room -= int(total[num - 1]) if num else 0
        rows = rows[num + 1 :]
        rows = rows[sizes[rows] <= room]
    return taken
