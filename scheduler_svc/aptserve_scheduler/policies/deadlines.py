"""Which requests to serve when not all can meet their deadlines.

On one machine, the fewest jobs are late when they run in the order of their deadlines and, each
time the next one would be late, the longest job so far is left out (Moore 1968). Here several
resources are due by each deadline, time and memory; the one that runs out first decides by whose
costs somebody is left out, so the result is a good one and not proven to be the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush, heappushpop

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, any_of, indices


def keep_most(
    demands: Sequence[Floats], supplies: Sequence[Floats], costs: Sequence[Floats]
) -> Bools:
    """Keep as many of n requests, in order of deadline, as k resources allow.

    ``demands`` [k, n], not negative: what each request needs; ``supplies`` [k, n]: what there is,
    until its deadline, for it and all kept before it; ``costs`` [k, n]: when resource k runs short,
    the most costly so far is left out first. Returns [n] who is kept.
    """
    totals = [demand.cumsum() for demand in demands]
    is_short = [total > supply for total, supply in zip(totals, supplies, strict=True)]
    # What suffices for everybody suffices for those who are kept.
    scarce = [k for k, short in enumerate(is_short) if any_of(short)]
    if not scarce:
        return np.ones(len(demands[0]), np.bool_)
    first = min(int(is_short[k].argmax()) for k in scarce)
    resources = [
        _Scarce(demands[k], supplies[k], costs[k], first, float(totals[k][first])) for k in scarce
    ]
    if len(resources) == 1:
        return resources[0].kept_alone()
    return _kept_of_several(resources)


class _Scarce:
    """A resource that runs out at the ``first`` request or later: what is used of it before, and a
    heap of the ranks by cost of who is kept, the costliest (of equal ones the first) on top."""

    def __init__(
        self, demand: Floats, supply: Floats, cost: Floats, first: int, total: float
    ) -> None:
        self.first = first
        self.demand = demand
        self.limits: list[float] = supply.tolist()
        self.used = total - float(demand[first])
        self.row_at = (-cost).argsort(kind="stable")
        """By rank."""
        ranks = np.empty_like(self.row_at)
        ranks[self.row_at] = np.arange(len(ranks))
        self.rank_of: list[int] = ranks.tolist()
        self.heap = sorted(self.rank_of[:first])

    def kept_alone(self) -> Bools:
        """[n] who is kept when nothing else is scarce: whoever is in the heap in the end."""
        first, used, heap = self.first, self.used, self.heap
        need_at: list[float] = self.demand[self.row_at].tolist()
        for limit, rank in zip(self.limits[first:], self.rank_of[first:], strict=True):
            used += need_at[rank]
            if used <= limit:
                heappush(heap, rank)
                continue
            used -= need_at[heappushpop(heap, rank)]
            while used > limit and heap:
                used -= need_at[heappop(heap)]
        kept = np.zeros(len(self.demand), np.bool_)
        kept[self.row_at[heap]] = True
        return kept


def _kept_of_several(resources: list[_Scarce]) -> Bools:
    """[n] who is kept; a heap may still hold some who were left out for another resource."""
    first, num = resources[0].first, len(resources[0].demand)
    needs: list[list[float]] = [resource.demand.tolist() for resource in resources]
    is_kept = bytearray(b"\1") * num
    for row in range(first, num):
        for resource, need in zip(resources, needs, strict=True):
            resource.used += need[row]
            heappush(resource.heap, resource.rank_of[row])
        for resource in resources:
            heap, limit = resource.heap, resource.limits[row]
            while resource.used > limit and heap:
                out = int(resource.row_at[heappop(heap)])
                if is_kept[out]:
                    is_kept[out] = False
                    for other, need in zip(resources, needs, strict=True):
                        other.used -= need[out]
    return np.frombuffer(is_kept, np.bool_)


def first_fits(sizes: Ints, room: int) -> Bools:
    """[n] who gets in when each in turn takes its size if it still fits."""
    taken = np.zeros(len(sizes), np.bool_)
    rows = indices(sizes <= room)
    while len(rows):
        total = sizes[rows].cumsum()
        num = int(total.searchsorted(room, side="right"))
        taken[rows[:num]] = True
        room -= int(total[num - 1]) if num else 0
        rows = rows[num + 1 :]
        rows = rows[sizes[rows] <= room]
    return taken
