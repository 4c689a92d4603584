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
    needs: list[list[float]] = demands[scarce].tolist()
    limits: list[list[float]] = supplies[scarce].tolist()
    used: list[float] = (totals[scarce, first] - demands[scarce, first]).tolist()
    # Ranks by cost of those seen so far, the costliest (of equal ones the first) on top.
    by_cost = [np.argsort(-row, kind="stable") for row in costs[scarce]]
    row_at: list[list[int]] = [rows.tolist() for rows in by_cost]
    rank_of: list[list[int]] = [rows.argsort().tolist() for rows in by_cost]
    heaps = [sorted(ranks[:first]) for ranks in rank_of]
    is_kept = bytearray(b"\1") * len(kept)
    resources = range(len(needs))
    for row in range(first, len(kept)):
        for resource in resources:
            used[resource] += needs[resource][row]
            heappush(heaps[resource], rank_of[resource][row])
        for resource in resources:
            heap, limit = heaps[resource], limits[resource][row]
            while used[resource] > limit and heap:
                out = row_at[resource][heappop(heap)]
                if is_kept[out]:
                    is_kept[out] = False
                    for other in resources:
                        used[other] -= needs[other][out]
    return np.frombuffer(is_kept, np.bool_)


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
