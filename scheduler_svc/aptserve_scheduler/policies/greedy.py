"""Greedy solution of the batch-composition problem, a multiple-choice knapsack.

Each request offers tiers with a value and a need; at most one tier per request is chosen so that
the needs fit and the values add up to as much as possible. The method (Apt-Serve, SIGMOD 2025,
Algorithm 1, stated for any tier set):

1. Per request keep the tiers on the upper concave hull of (units, value), the origin included.
   Going along the hull is a series of increments whose value per unit falls.
2. Sort the increments of all requests by value per unit and take them while they fit. Go on past
   one that does not fit: smaller ones behind it may. An increment whose predecessor on the same
   hull was not taken is not taken either.
3. Compare with the choice behind the first increment that did not fit, taken whole and alone.

With units as the only limit the result is worth at least half the optimum: the increments up to and
including the first that does not fit are worth at least the relaxed optimum, and the one is covered
by step 2, the other by step 3. Going on in step 2 only adds.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints

NOT_CHOSEN = -1

_CHUNK = 256
"""Increments that are sorted at a time; most never have to be."""
_ONE_BY_ONE = 64
"""Increments up to which a plain loop beats another round over arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class Knapsack:
    """n requests with k options each, under r limits."""

    values: Floats
    """[k, n]; an option worth 0 or less (``-inf`` if it does not exist) is never chosen."""
    needs: tuple[Ints, ...]
    """r arrays [k, n], >= 0. The first is units of memory and rises strictly along k; the others
    do not fall. What is the same for all may be a broadcast view."""
    capacity: tuple[int, ...]
    """r limits."""

    def worth(self, choice: Ints) -> float:
        """Total value of a choice (option per request)."""
        rows = (choice != NOT_CHOSEN).nonzero()[0]
        return float(self.values[choice[rows], rows].sum())

    def fits(self, choice: Ints) -> bool:
        """Whether a choice is within all limits."""
        rows = (choice != NOT_CHOSEN).nonzero()[0]
        options = choice[rows]
        limits = zip(self.needs, self.capacity, strict=True)
        return all(int(need[options, rows].sum()) <= limit for need, limit in limits)


def solve(knapsack: Knapsack) -> Ints:
    """Option per request, ``NOT_CHOSEN`` for none; shape [n]."""
    knapsack = _without_oversized(knapsack)
    bases = _first_steps(knapsack)
    # A few are packed as fast as it is found out that all of them fit.
    if _ONE_BY_ONE < len(bases.rows) <= min(knapsack.capacity):
        best = _most_valuable(knapsack, bases)
        if knapsack.fits(best):
            return best
    packing = _Packing(knapsack)
    packing.take_all(bases)
    return packing.better_of_one()


def _without_oversized(knapsack: Knapsack) -> Knapsack:
    """Options that would not even fit alone can never be part of a solution."""
    values = knapsack.values
    for need, limit in zip(knapsack.needs, knapsack.capacity, strict=True):
        if need.size and need.max() > limit:
            values = np.where(need > limit, -np.inf, values)
    return Knapsack(values, knapsack.needs, knapsack.capacity)


class _Increments(NamedTuple):
    """Steps along the hulls of requests; parallel arrays."""

    rows: Ints
    """Request of each."""
    before: Ints
    """Option that it starts from, ``NOT_CHOSEN`` for a first step."""
    after: Ints
    """Option that it leads to, higher than the one before."""
    slopes: Floats
    """Value per unit, > 0; never more than that of the step before it on the same hull."""

    def pick(self, index: Ints) -> _Increments:
        """Some of them."""
        return _Increments(
            self.rows[index], self.before[index], self.after[index], self.slopes[index]
        )

    def split(self, first: Bools) -> tuple[_Increments, _Increments]:
        """Those where the mask holds, and the others."""
        return self.pick(first.nonzero()[0]), self.pick((~first).nonzero()[0])

    def steepest(self, num: int) -> Bools:
        """Mask of so many of the steepest; of equally steep ones the earliest."""
        # Sorting plain numbers is fast throughout; partitioning is slow when many are equal.
        threshold = np.sort(self.slopes)[-num]
        mask: Bools = self.slopes > threshold
        ties = (self.slopes == threshold).nonzero()[0]
        mask[ties[: num - int(np.count_nonzero(mask))]] = True
        return mask

    def needs(self, resources: tuple[Ints, ...]) -> list[Ints]:
        """What each takes of each resource beyond the step before it; resources are [k, n]."""
        rows, after = self.rows, self.after
        steps = [need[after, rows] for need in resources]
        upgrades = (self.before != NOT_CHOSEN).nonzero()[0]
        if len(upgrades):
            rows, before = rows[upgrades], self.before[upgrades]
            for need, step in zip(resources, steps, strict=True):
                step[upgrades] -= need[before, rows]
        return steps


def _joined(parts: list[_Increments]) -> _Increments:
    if len(parts) == 1:
        return parts[0]
    return _Increments(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.before for part in parts]),
        np.concatenate([part.after for part in parts]),
        np.concatenate([part.slopes for part in parts]),
    )


def _first_steps(knapsack: Knapsack) -> _Increments:
    """The hulls' first steps, of requests that have any: the steepest, of equals the nearest."""
    values, units = knapsack.values, knapsack.needs[0]
    slopes = values[0] / units[0]
    after = np.zeros(len(slopes), np.int64)
    for option in range(1, len(values)):
        slope = values[option] / units[option]
        steeper = slope > slopes
        slopes = np.where(steeper, slope, slopes)
        after[steeper] = option
    rows = (slopes > 0).nonzero()[0]
    return _Increments(rows, np.full(len(rows), NOT_CHOSEN), after[rows], slopes[rows])


def _further_steps(knapsack: Knapsack, bases: _Increments) -> list[_Increments]:
    """The other steps of the hulls that start with these, level by level."""
    levels: list[_Increments] = []
    last = bases
    for _ in range(1, len(knapsack.values)):
        last = _next_steps(knapsack, last)
        if not len(last.rows):
            break
        levels.append(last)
    return levels


def _next_steps(knapsack: Knapsack, last: _Increments) -> _Increments:
    """The step that follows each on its hull, where one does: again the steepest, the nearest."""
    values, units = knapsack.values, knapsack.needs[0]
    best = np.zeros(len(last.rows))
    after = last.after.copy()
    for option in range(1, len(values)):
        index = (last.after < option).nonzero()[0]
        here, row = last.after[index], last.rows[index]
        gain = values[option, row] - values[here, row]
        slope = gain / (units[option, row] - units[here, row])
        steeper = slope > best[index]
        best[index[steeper]] = slope[steeper]
        after[index[steeper]] = option
    goes_on = (best > 0).nonzero()[0]
    # Rounding must not put an upgrade before its base.
    capped = np.minimum(best, last.slopes)
    return _Increments(last.rows, last.after, after, capped).pick(goes_on)


def _most_valuable(knapsack: Knapsack, bases: _Increments) -> Ints:
    """The end of each hull, limits aside."""
    choice = np.full(knapsack.values.shape[1], NOT_CHOSEN)
    for level in [bases, *_further_steps(knapsack, bases)]:
        choice[level.rows] = level.after
    return choice


class _Packing:
    """A choice in the making and what is left of each limit."""

    def __init__(self, knapsack: Knapsack) -> None:
        self._knapsack = knapsack
        num_rows = knapsack.values.shape[1]
        self._choice: Ints = np.full(num_rows, NOT_CHOSEN)
        self._left = list(knapsack.capacity)
        # Lowest option of each request to which a step did not fit: nothing from there on follows.
        self._barred: Ints = np.full(num_rows, len(knapsack.values))
        # Steepest increment that did not fit: its slope, request and option.
        self._first_unfit: tuple[float, int, int] | None = None

    def take_all(self, bases: _Increments) -> None:
        """Take increments by falling slope while they fit, past those that do not.

        Goes down the slopes a chunk at a time: of many candidates few are ever sorted, since what
        cannot fit any more is dropped before the next chunk. An upgrade is no steeper than its
        base, so the upgrades of a chunk come from its own bases and those of chunks before.
        """
        carried: list[_Increments] = []
        while len(bases.rows) > _CHUNK:
            first = bases.steepest(_CHUNK)
            steep = bases.pick(first.nonzero()[0])
            upgrades = [*carried, *_further_steps(self._knapsack, steep)]
            # Where bases of the last slope are left for later, upgrades of that slope wait too.
            parts = [part.split(part.slopes > steep.slopes.min()) for part in upgrades]
            self._take_unsorted([steep, *(now for now, _ in parts)])
            carried = [later for _, later in parts if len(later.rows)]
            bases = self._those_that_fit(bases, ~first)
        self._take_unsorted([bases, *carried, *_further_steps(self._knapsack, bases)])

    def _take_unsorted(self, parts: list[_Increments]) -> None:
        """Take what fits of a chunk whose first steps stand first."""
        chunk = _joined(parts)
        if not len(chunk.rows):
            return
        # Stable: of equal slopes the base and the earlier go first.
        order = np.argsort(-chunk.slopes, kind="stable")
        allowed = chunk.after < self._barred[chunk.rows]
        self._take_sorted(chunk.pick(order[allowed[order]]))

    def better_of_one(self) -> Ints:
        """The choice, or the one behind the first increment that did not fit if worth more."""
        if self._first_unfit is not None:
            _, row, option = self._first_unfit
            if self._knapsack.values[option, row] > self._knapsack.worth(self._choice):
                self._choice[:] = NOT_CHOSEN
                self._choice[row] = option
        return self._choice

    def _take_sorted(self, rest: _Increments) -> None:
        """In rounds: the longest prefix that fits, then strike out what cannot fit any more."""
        steps = rest.needs(self._knapsack.needs)
        while len(rest.rows) > _ONE_BY_ONE:
            num_taken = self._take_prefix(rest, steps)
            if num_taken == len(rest.rows):
                return
            self._note_unfit(rest, num_taken)
            fits = np.ones(len(rest.rows), np.bool_)
            for step, left in zip(steps, self._left, strict=True):
                fits &= step <= left
            fits[:num_taken] = True
            np.minimum.at(self._barred, rest.rows[~fits], rest.after[~fits])
            allowed = rest.after[num_taken:] < self._barred[rest.rows[num_taken:]]
            index = num_taken + allowed.nonzero()[0]
            rest, steps = rest.pick(index), [step[index] for step in steps]
        self._take_one_by_one(rest, [step.tolist() for step in steps])

    def _take_prefix(self, rest: _Increments, steps: list[Ints]) -> int:
        """Take increments up to the first that does not fit; returns how many."""
        totals = [step.cumsum() for step in steps]
        num_taken = min(
            int(total.searchsorted(left, side="right"))
            for total, left in zip(totals, self._left, strict=True)
        )
        if num_taken:
            last = num_taken - 1
            self._left = [
                left - int(total[last]) for total, left in zip(totals, self._left, strict=True)
            ]
            # Of several steps of a request the furthest counts; it has the highest option.
            np.maximum.at(self._choice, rest.rows[:num_taken], rest.after[:num_taken])
        return num_taken

    def _take_one_by_one(self, rest: _Increments, steps: list[list[int]]) -> None:
        rows, options = rest.rows.tolist(), rest.after.tolist()
        left = self._left
        barred: dict[int, int] = {}
        """What this loop adds to ``_barred``; what was barred before is not in ``rest``."""
        taken: list[int] = []
        first_unfit: int | None = None
        for place, need in enumerate(zip(*steps, strict=True)):
            row = rows[place]
            if row in barred:
                continue
            if all(map(operator.le, need, left)):
                left = list(map(operator.sub, left, need))
                taken.append(place)
            else:
                barred[row] = options[place]
                if first_unfit is None:
                    first_unfit = place
        if first_unfit is not None:
            self._note_unfit(rest, first_unfit)
        self._left = left
        if taken:
            # A request's steps stand in the order of its options: the last one is the one to keep.
            self._choice[rest.rows[taken]] = rest.after[taken]
        if barred:
            self._barred[list(barred)] = list(barred.values())

    def _those_that_fit(self, bases: _Increments, candidates: Bools) -> _Increments:
        """Candidates among the first steps that could still be taken."""
        limits = list(zip(self._knapsack.needs, self._left, strict=True))
        # Needs do not fall along the options: the first one's are the least there are.
        if any(need[0].min() > left for need, left in limits):
            fits = np.zeros_like(candidates)
        else:
            fits = candidates.copy()
            for need, left in limits:
                fits &= need[bases.after, bases.rows] <= left
        slopes_of_others = np.where(candidates & ~fits, bases.slopes, 0.0)
        steepest = int(np.argmax(slopes_of_others))
        if slopes_of_others[steepest] > 0:
            self._note_unfit(bases, steepest)
        return bases.pick(fits.nonzero()[0])

    def _note_unfit(self, increments: _Increments, place: int) -> None:
        slope = float(increments.slopes[place])
        if self._first_unfit is None or slope > self._first_unfit[0]:
            row, option = int(increments.rows[place]), int(increments.after[place])
            self._first_unfit = (slope, row, option)
