"""Goodput: the highest request rate at which a share of the requests meets its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from aptserve.evaluation.intervals import half_width
from aptserve.evaluation.report import Cell

_STEP = 2.0
"""Factor between rates until the target lies between two of them."""


class Bound(Enum):
    """How a search ended."""

    FOUND = "found"
    """The rate meets the target, and a rate above it within the tolerance does not."""
    COARSE = "coarse"
    """As found, but the evaluations ran out before the tolerance was reached."""
    AT_LEAST = "at_least"
    """The highest rate tried still meets the target."""
    BELOW = "below"
    """The lowest rate tried does not meet it."""


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Where a search looks, in requests per second. ValueError names a field out of range."""

    lowest: float = 2.0**-10
    highest: float = 2.0**12
    start: float = 1.0
    tolerance: float = 0.02
    """Largest relative distance between the rate that meets the target and the one that fails."""
    max_evaluations: int = 32
    """Different rates, for all targets together."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.start <= self.highest < math.inf:
            raise ValueError(
                "start: 0 < lowest <= start <= highest must hold, not "
                f"{self.lowest:g}, {self.start:g}, {self.highest:g}"
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: must be in (0, 1), not {self.tolerance:g}")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations: must be at least 1, not {self.max_evaluations}")


@dataclass(frozen=True, slots=True)
class FoundRate:
    """What a search knows about one target."""

    target: float
    rate: float
    """Requests per second; how it is to be read, ``bound`` says."""
    bound: Bound
    num_evaluations: int
    """Different rates looked at, for all targets together."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """The goodput of a cell at one target."""

    cell: Cell
    target: float
    rate: float
    """Highest rate at which the mean attainment over seeds meets the target."""
    bound: Bound
    half_width: float | None
    """Of its 95 % interval, by the spread of ``seed_rates``; ``None``: not known."""
    seed_rates: tuple[float | None, ...]
    """The :func:`crossing` of each seed alone; ``None`` where it is out of reach."""
    num_evaluations: int


class GoodputSearch:
    """Bisection that asks for attainments one rate at a time, and remembers them.

    Attainment is taken to fall with the rate. Where it does not, as noise has it, the answer is
    next to the lowest rate that fails: nothing is claimed beyond a failure.
    """

    def __init__(self, targets: Sequence[float], limits: SearchLimits | None = None) -> None:
        for target in targets:
            if not 0 < target <= 1:
                raise ValueError(f"target: must be in (0, 1], not {target:g}")
        self._targets = tuple(sorted(set(targets), reverse=True))
        self._limits = limits or SearchLimits()
        self._known: dict[float, float] = {}
        self._num_evaluations = 0

    def learn(self, rate: float, attainment: float) -> None:
        """Take note of the attainment at a rate, one that was asked for or any other."""
        self._known[rate] = attainment

    def next_rate(self) -> float | None:
        """A rate whose attainment is needed next, or ``None`` when all is known.

        Whoever asks must :meth:`learn` it before asking again.
        """
        if self._num_evaluations >= self._limits.max_evaluations:
            return None
        for target in self._targets:
            rate = self._next_rate(target)
            if rate is not None:
                self._num_evaluations += 1
                return rate
        return None

    def result(self, target: float) -> FoundRate:
        """What is known by now; ValueError before the first evaluation."""
        if not self._known:
            raise ValueError("target: nothing has been evaluated")
        low, high = self._bracket(target)
        if low is None:
            rate, bound = min(self._known), Bound.BELOW
        elif high is None:
            rate, bound = low, Bound.AT_LEAST
        else:
            rate, bound = low, Bound.FOUND if self._is_narrow(low, high) else Bound.COARSE
        return FoundRate(target, rate, bound, len(self._known))

    def _next_rate(self, target: float) -> float | None:
        limits = self._limits
        if not self._known:
            return limits.start
        low, high = self._bracket(target)
        if high is None:
            assert low is not None
            return min(low * _STEP, limits.highest) if low < limits.highest else None
        if low is None:
            return max(high / _STEP, limits.lowest) if high > limits.lowest else None
        return None if self._is_narrow(low, high) else (low + high) / 2

    def _bracket(self, target: float) -> tuple[float | None, float | None]:
        """The highest rate that meets the target under the lowest that does not, and the latter."""
        high = min((rate for rate, share in self._known.items() if share < target), default=None)
        met = (rate for rate in self._known if high is None or rate < high)
        return max(met, default=None), high

    def _is_narrow(self, low: float, high: float) -> bool:
        return high <= low * (1 + self._limits.tolerance)


def find_goodput(
    attainment: Callable[[float], float], target: float, limits: SearchLimits | None = None
) -> FoundRate:
    """The highest rate with ``attainment(rate) >= target``; no rate is evaluated twice."""
    search = GoodputSearch([target], limits)
    while (rate := search.next_rate()) is not None:
        search.learn(rate, attainment(rate))
    return search.result(target)


def crossing(attainments: Mapping[float, float], target: float) -> float | None:
    """Where one seed's attainment, linear between the rates evaluated, first falls under a target.

    ``None`` when that is not between two of the rates.
    """
    points = sorted(attainments.items())
    if not points or points[0][1] < target:
        return None
    for (low, above), (high, under) in pairwise(points):
        if under < target:
            return low + (high - low) * (above - target) / (above - under)
    return None


def goodput_of(cell: Cell, found: FoundRate, by_seed: Sequence[Mapping[float, float]]) -> Goodput:
    """The result of a search with its interval.

    ``by_seed`` has, for each seed, its attainments by rate. The half width stays unknown if one of
    them does not cross the target.
    """
    crossings = tuple(crossing(attainments, found.target) for attainments in by_seed)
    known = [rate for rate in crossings if rate is not None]
    is_bracketed = found.bound in (Bound.FOUND, Bound.COARSE) and len(known) == len(crossings)
    return Goodput(
        cell=cell,
        target=found.target,
        rate=found.rate,
        bound=found.bound,
        half_width=half_width(known) if is_bracketed else None,
        seed_rates=crossings,
        num_evaluations=found.num_evaluations,
    )
