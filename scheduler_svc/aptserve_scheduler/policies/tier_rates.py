"""What a worker's tiers take of its memory and of its time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import BatchProblem

NUM_TIER_NUMBERS = max(Tier) + 1


@dataclass(frozen=True, slots=True, eq=False)
class TierRates:
    """A worker's tiers at an estimate of its speed; arrays by the tier's number."""

    tiers: tuple[TierSpec, ...]
    cost: CostCoefficients
    kv: TierSpec
    compact: TierSpec
    """The tier with the fewest units per block, which may be KV."""
    units_per_block: Ints
    seconds_per_cached: Floats
    """What a cached token adds to a decode."""
    extra_seconds: Floats
    """rho: that beyond what one of KV adds, never < 0."""

    @classmethod
    def of(cls, problem: BatchProblem, last: TierRates | None = None) -> TierRates:
        """Those of a problem: the last ones again if they are of the same estimate."""
        tiers, cost = problem.tiers, problem.cost
        if last is not None and last.tiers is tiers and last.cost is cost:
            return last
        units, seconds = np.zeros(NUM_TIER_NUMBERS, np.int64), np.zeros(NUM_TIER_NUMBERS)
        for tier in tiers:
            units[tier.tier] = tier.units_per_block
            seconds[tier.tier] = cost.seconds_per_cached_token.get(tier.tier, 0.0)
        return cls(
            tiers=tiers,
            cost=cost,
            kv=tiers[0],
            compact=min(tiers, key=lambda tier: tier.units_per_block),
            units_per_block=units,
            seconds_per_cached=seconds,
            extra_seconds=np.maximum(seconds - seconds[tiers[0].tier], 0.0),
        )
