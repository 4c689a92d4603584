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

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.policies.base import Floats, Ints

NOT_CHOSEN = -1

_CHUNK = 512
"""Increments that are sorted at a time; most never have to be."""
_ONE_BY_ONE = 64
"""Increments up to which a plain loop beats another round over arrays."""
_NONE: Ints = np.zeros(0, np.int64)


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
    if len(bases.rows) <= min(knapsack.capacity):
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


@dataclass(frozen=True, slots=True, eq=False)
class _Increments:
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

    def split(self, threshold: float) -> tuple[_Increments, _Increments]:
        """Those at least as steep as the threshold, and the others."""
        steep = self.slopes >= threshold
        return self.pick(steep.nonzero()[0]), self.pick((~steep).nonzero()[0])

    def needs(self, need: Ints) -> Ints:
        """What each takes of one resource beyond the step before it; ``need`` is [k, n]."""
        step = need[self.after, self.rows]
        upgrades = (self.before != NOT_CHOSEN).nonzero()[0]
        if len(upgrades):
            step[upgrades] -= need[self.before[upgrades], self.rows[upgrades]]
        return step


def _joined(parts: list[_Increments]) -> _Increments:
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
        self._first_unfit: tuple[int, int] | None = None

    def take_all(self, bases: _Increments) -> None:
        """Take increments by falling slope while they fit, past those that do not.

        Goes down the slopes a chunk at a time: of many candidates few are ever sorted, since what
        cannot fit any more is dropped before the next chunk. An upgrade is no steeper than its
        base, so the upgrades of a chunk come from its own bases and those of chunks before.
        """
        carried: list[_Increments] = []
        while len(bases.rows):
            threshold = 0.0
            if len(bases.rows) > _CHUNK:
                threshold = float(np.partition(bases.slopes, -_CHUNK)[-_CHUNK])
            steep, bases = bases.split(threshold)
            upgrades = _joined(
                [*carried, *_further_steps(self._knapsack, steep), steep.pick(_NONE)]
            )
            now, later = upgrades.split(threshold)
            chunk = _joined([steep, now])
            # Stable, and bases stand first: of equal slopes the base and the earlier go first.
            self._take_sorted(chunk.pick(np.argsort(-chunk.slopes, kind="stable")))
            carried = [later]
            bases = self._those_that_fit(bases)
        if carried:
            rest = carried[0]
            self._take_sorted(rest.pick(np.argsort(-rest.slopes, kind="stable")))

    def better_of_one(self) -> Ints:
        """The choice, or the one behind the first increment that did not fit if worth more."""
        if self._first_unfit is not None:
            row, option = self._first_unfit
            if self._knapsack.values[option, row] > self._knapsack.worth(self._choice):
                self._choice[:] = NOT_CHOSEN
                self._choice[row] = option
        return self._choice

    def _take_sorted(self, rest: _Increments) -> None:
        """In rounds: the longest prefix that fits, then strike out what cannot fit any more."""
        rest = rest.pick((~self._struck[rest.rows]).nonzero()[0])
        rows, after = rest.rows, rest.after
        steps = np.stack([rest.needs(need) for need in self._knapsack.needs])
        while len(rows) > _ONE_BY_ONE:
            left = np.array(self._left)[:, None]
            totals = np.cumsum(steps, axis=1)
            within = (totals <= left).all(axis=0)
            num_taken = int(np.count_nonzero(within))  # totals never fall
            if num_taken:
                left = left - totals[:, num_taken - 1 : num_taken]
                self._left = left[:, 0].tolist()
                # Of several steps of a request the furthest counts; it has the highest option.
                np.maximum.at(self._choice, rows[:num_taken], after[:num_taken])
            if num_taken == len(rows):
                return
            self._note_unfit(int(rows[num_taken]), int(after[num_taken]))
            rows, after, steps = rows[num_taken:], after[num_taken:], steps[:, num_taken:]
            fits = (steps <= left).all(axis=0)
            np.minimum.at(self._barred, rows[~fits], after[~fits])
            keep = (after < self._barred[rows]).nonzero()[0]
            rows, after, steps = rows[keep], after[keep], steps[:, keep]
        self._take_one_by_one(rows.tolist(), after.tolist(), steps.T.tolist())

    def _take_one_by_one(self, rows: list[int], after: list[int], steps: list[list[int]]) -> None:
        for row, option, need in zip(rows, after, steps, strict=True):
            if option >= self._barred[row]:
                continue
            left = [have - takes for have, takes in zip(self._left, need, strict=True)]
            if min(left) < 0:
                self._barred[row] = option
                self._note_unfit(row, option)
            else:
                self._left = left
                self._choice[row] = option

    def _those_that_fit(self, bases: _Increments) -> _Increments:
        """First steps that could still be taken."""
        for need, left in zip(self._knapsack.needs, self._left, strict=True):
            # Needs do not fall along the options, so these are the least there are.
            if not len(bases.rows) or need[0].min() > left:
                return bases.pick(_NONE)
        for need, left in zip(self._knapsack.needs, self._left, strict=True):
            bases = bases.pick((bases.needs(need) <= left).nonzero()[0])
        return bases

    def _note_unfit(self, row: int, option: int) -> None:
        if self._first_unfit is None:
            self._first_unfit = (row, option)
