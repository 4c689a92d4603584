"""What ``apt`` reads from a problem once per decision, for either kind of iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, indices
from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import BatchProblem

HEADROOM = 0.01
"""Share of the pool that admissions and promotions leave free while requests run."""
_NUM_TIER_NUMBERS = 128
_HIDDEN = int(Tier.HIDDEN)
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

    def cost_seconds(self, num_hurt: int, num_cached: Ints) -> Floats:
        """U * rho * m: what hidden caches of these lengths take off the value."""
        cost: Floats = num_hurt * (self.extra_seconds[_HIDDEN] * num_cached)
        return cost

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


class Rising(NamedTuple):
    """The ready that could be promoted to KV; parallel arrays, not empty."""

    entries: Ints
    """Entries of the arrays of all the ready."""
    pending_seconds: Floats
    """p, at least one decode step."""
    cost_seconds: Floats
    """U * rho * m: what staying hidden takes off the value."""
    least_more_units: int
    """What being promoted takes of the shortest beyond what its next token does."""

    @property
    def are_worth(self) -> Bools:
        """Whose value is positive as he is."""
        worth: Bools = self.pending_seconds > self.cost_seconds
        return worth

    @classmethod
    def of(
        cls,
        problem: BatchProblem,
        figures: TierFigures,
        entries: Ints,
        num_cached: Ints,
        pending_seconds: Floats,
    ) -> Rising:
        """The ready with these entries, at least one; their caches and p are parallel to them."""
        num_blocks = int(np.minimum.reduce(num_cached)) // problem.block_size + 1
        in_kv = problem.tiers[0].units_per_block
        more_per_block = in_kv - int(figures.units_per_block[_HIDDEN])
        return cls(
            entries=entries,
            pending_seconds=pending_seconds,
            cost_seconds=figures.cost_seconds(num_hurt(problem), num_cached),
            least_more_units=num_blocks * more_per_block,
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
    may_rise: Bools
    """Could be promoted: hidden, and would fit the pool in KV."""
    rising: Rising | None
    """These; ``None`` if there are none."""
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
        may_rise: Bools = tiers == _HIDDEN
        may_rise &= problem.fits_pool(running, problem.tiers[0])
        waiting_seconds = float(np.add.reduce(waiting.pending_seconds))
        num_under_way = 0
        if len(ready) < len(running):
            under_way = indices(running.schedulable & ~one_left)
            num_under_way = len(under_way)
            waiting_seconds += float(np.add.reduce(pending[under_way]))
            tiers, num_cached = tiers[ready], num_cached[ready]
            num_units, pending = num_units[ready], pending[ready]
            may_rise = may_rise[ready]
        next_units = problem.num_blocks(num_cached + 1) * figures.units_per_block[tiers]
        step_seconds = decode_step_seconds(figures, tiers, num_cached)
        entries, rising = indices(may_rise), None
        if len(entries):
            least_pending = np.maximum(pending[entries], step_seconds)
            rising = Rising.of(problem, figures, entries, num_cached[entries], least_pending)
        held_units, grown_units = int(np.add.reduce(num_units)), int(np.add.reduce(next_units))
        return cls(
            figures=figures,
            ready=ready,
            tiers=tiers,
            num_cached=num_cached,
            num_units=num_units,
            next_units=next_units,
            may_rise=may_rise,
            rising=rising,
            pending_seconds=pending,
            held_units=held_units,
            grown_units=grown_units,
            running_seconds=float(np.add.reduce(pending)),
            waiting_seconds=waiting_seconds,
            num_waiting=len(waiting) + num_under_way,
            num_under_way=num_under_way,
            least_pending_seconds=step_seconds,
            headroom=max(grown_units - held_units, least_headroom(problem)),
        )


def decode_step_seconds(figures: TierFigures, tiers: Tiers, num_cached: Ints) -> float:
    """Time of a decode of requests with these caches, by the cost model; always positive."""
    cost = figures.cost
    # Tokens by tier first: a product as long as the batch goes to threads that take milliseconds.
    tokens = np.bincount(tiers, num_cached, _NUM_TIER_NUMBERS)
    cached = float(figures.cached_seconds @ tokens)
    per_sequence = cost.seconds_per_token + cost.seconds_per_sequence
    return max(cost.base_seconds + per_sequence * len(tiers) + cached, _SHORTEST_SECONDS)


def most_decodes(problem: BatchProblem) -> int:
    """Requests that a decode can take."""
    return min(problem.max_num_seqs, problem.max_num_batched_tokens)


def least_headroom(problem: BatchProblem) -> int:
    """Units that stay free whatever the next decode step takes."""
    return int(HEADROOM * problem.num_units) if len(problem.running) else 0


def num_hurt(problem: BatchProblem) -> int:
    """U: all candidates."""
    return len(problem.waiting) + len(problem.running)


def has_place(problem: BatchProblem, figures: TierFigures, room: int) -> bool:
    """Whether the shortest of the waiting could start in so many units, in the smallest tier."""
    least_units = figures.least_units_per_block
    if not len(problem.waiting) or len(problem.running) >= problem.max_num_seqs:
        return False
    if room < least_units:  # known without looking at the lengths, and often so in overload
        return False
    shortest = int(np.minimum.reduce(problem.waiting.num_tokens))
    return (shortest + problem.block_size) // problem.block_size * least_units <= room
