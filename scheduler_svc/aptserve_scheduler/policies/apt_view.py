"""What ``apt`` reads from a problem once per decision, for either kind of iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import BatchProblem, Floats, Ints, Tiers
from aptserve_scheduler.policies.common import indices

HEADROOM = 0.01
"""Share of the pool that admissions and promotions leave free while requests run."""
_NUM_TIER_NUMBERS = 128
_SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class TierFigures:
    """A worker's tiers at an estimate of its speed; arrays by the tier's number."""

    tiers: tuple[TierSpec, ...]
    cost: CostCoefficients
    units_per_block: Ints
    least_units_per_block: int
    cached_seconds: Floats
    """Seconds per cached token."""
    extra_seconds: Floats
    """rho: seconds per cached token beyond KV's, never < 0."""

    @classmethod
    def of(cls, problem: BatchProblem, last: TierFigures | None = None) -> TierFigures:
        """Those of a problem: the last ones again if they are of the same estimate."""
        tiers, cost = problem.tiers, problem.cost
        if last is not None and last.tiers is tiers and last.cost is cost:
            return last
        per_cached = cost.seconds_per_cached_token
        units = np.zeros(_NUM_TIER_NUMBERS, np.int64)
        cached, extra = np.zeros(_NUM_TIER_NUMBERS), np.zeros(_NUM_TIER_NUMBERS)
        for number, seconds in per_cached.items():
            cached[number] = seconds
        for tier in tiers:
            units[tier.tier] = tier.units_per_block
            extra[tier.tier] = max(0.0, cached[tier.tier] - per_cached.get(Tier.KV, 0.0))
        return cls(
            tiers=tiers,
            cost=cost,
            units_per_block=units,
            least_units_per_block=min(tier.units_per_block for tier in tiers),
            cached_seconds=cached,
            extra_seconds=extra,
        )


class View(NamedTuple):
    """Figures that both kinds of iteration need; the arrays are of the ready and parallel."""

    figures: TierFigures
    ready: Ints
    """Rows of ``running`` that a decode can take."""
    tiers: Tiers
    num_cached: Ints
    num_units: Ints
    """Units held."""
    next_units: Ints
    """Units that each holds with one more token, in its tier."""
    pending_seconds: Floats
    held_units: int
    """The sum of ``num_units``."""
    grown_units: int
    """The sum of ``next_units``."""
    running_seconds: float
    """The sum of ``pending_seconds``."""
    waiting_seconds: float
    """Pending time of those without a first token: waiting, and prompts under way."""
    num_waiting: int
    num_under_way: int
    """Prompts under way among these."""
    least_pending_seconds: float
    """One decode step of all the ready."""
    headroom: int
    """Units to leave free for the next decode step."""

    @property
    def prefers_prefill(self) -> bool:
        """The paper's rule for the kind of iteration."""
        return self.num_waiting > 0 and self.waiting_seconds >= self.running_seconds

    @property
    def comparison(self) -> str:
        """The rule's figures, for operators."""
        return (
            f"{self.num_waiting} waiting requests have {self.waiting_seconds:.3g} s pending "
            f"against {self.running_seconds:.3g} s of {len(self.ready)} running"
        )

    @classmethod
    def of(cls, problem: BatchProblem, figures: TierFigures) -> View:
        """The view of a problem."""
        waiting, running = problem.waiting, problem.running
        one_left = running.num_remaining_tokens == 1
        ready = indices(running.schedulable & one_left)
        tiers, num_cached = running.tiers, running.num_computed_tokens
        num_units, pending = running.num_units, running.pending_seconds
        waiting_seconds = float(np.add.reduce(waiting.pending_seconds))
        num_under_way = 0
        if len(ready) < len(running):
            under_way = indices(running.schedulable & ~one_left)
            num_under_way = len(under_way)
            waiting_seconds += float(np.add.reduce(pending[under_way]))
            tiers, num_cached = tiers[ready], num_cached[ready]
            num_units, pending = num_units[ready], pending[ready]
        next_units = problem.num_blocks(num_cached + 1) * figures.units_per_block[tiers]
        held_units, grown_units = int(np.add.reduce(num_units)), int(np.add.reduce(next_units))
        least_headroom = int(HEADROOM * problem.num_units) if len(running) else 0
        return cls(
            figures=figures,
            ready=ready,
            tiers=tiers,
            num_cached=num_cached,
            num_units=num_units,
            next_units=next_units,
            pending_seconds=pending,
            held_units=held_units,
            grown_units=grown_units,
            running_seconds=float(np.add.reduce(pending)),
            waiting_seconds=waiting_seconds,
            num_waiting=len(waiting) + num_under_way,
            num_under_way=num_under_way,
            least_pending_seconds=_decode_step_seconds(figures, tiers, num_cached),
            headroom=max(grown_units - held_units, least_headroom),
        )


def _decode_step_seconds(figures: TierFigures, tiers: Tiers, num_cached: Ints) -> float:
    """Time of a decode of requests with these caches, by the cost model; always positive."""
    cost = figures.cost
    # Tokens by tier first: a product as long as the batch goes to threads that take milliseconds.
    tokens = np.bincount(tiers, num_cached, _NUM_TIER_NUMBERS)
    cached = float(figures.cached_seconds @ tokens)
    per_sequence = cost.seconds_per_token + cost.seconds_per_sequence
    return max(cost.base_seconds + per_sequence * len(tiers) + cached, _SHORTEST_SECONDS)
