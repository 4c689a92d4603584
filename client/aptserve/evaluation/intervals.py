"""How sure a number is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds. A single seed gives no interval."""

    mean: float
    half_width: float | None
    """Of the 95 % confidence interval; ``None`` when it is unknown."""
    num_seeds: int

    @property
    def low(self) -> float:
        """Lower end of the interval, or the mean."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval, or the mean."""
        return self.mean + (self.half_width or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed, and the half width that :func:`half_width` gives.

    ValueError without values.
    """
    if not values:
        raise ValueError("values: at least one is needed")
    return Estimate(fmean(values), half_width(values), len(values))


def half_width(values: Sequence[float]) -> float | None:
    """Of the confidence interval of the mean: t(0.975, n - 1) · s / sqrt(n), Student's t.

    ``None`` for fewer than two values. Needs scipy.
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit

    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return quantile * stdev(values) / math.sqrt(n)


def wilson_interval(num_good: int, num_all: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), as if each request were a fair draw.

    Requests of one run share a queue, so that the truth is wider; several seeds show how much.
    (0, 1) when there is nothing to judge by; ValueError unless 0 <= num_good <= num_all.
    """
    if not 0 <= num_good <= num_all:
        raise ValueError(f"num_good: must be in [0, {num_all}], not {num_good}")
    if not num_all:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = num_good / num_all
    scale = 1 + z * z / num_all
    centre = (share + z * z / (2 * num_all)) / scale
    spread = z / scale * math.sqrt(share * (1 - share) / num_all + (z / (2 * num_all)) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)
