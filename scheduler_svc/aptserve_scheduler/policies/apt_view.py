"""What ``apt`` reads from a problem once per decision, for either kind of iteration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, indices
from aptserve_scheduler.core.types import Tier
from aptserve_scheduler.policies.base import BatchProblem
from aptserve_scheduler.policies.tier_rates import NUM_TIER_NUMBERS, TierRates

HEADROOM = 0.01
"""Share of the pool that admissions and promotions leave free while requests run."""
_HIDDEN = int(Tier.HIDDEN)
_SHORTEST_SECONDS = 1e-9


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
        rates: TierRates,
        entries: Ints,
        num_cached: Ints,
        pending_seconds: Floats,
    ) -> Rising:
        """The ready with these entries, at least one; their caches and p are parallel to them."""
        num_blocks = int(np.minimum.reduce(num_cached)) // problem.block_size + 1
        in_kv = problem.tiers[0].units_per_block
        more_per_block = in_kv - int(rates.units_per_block[_HIDDEN])
        return cls(
            entries=entries,
            pending_seconds=pending_seconds,
            cost_seconds=hidden_cost_seconds(rates, num_hurt(problem), num_cached),
            least_more_units=num_blocks * more_per_block,
        )


class View(NamedTuple):
    """Figures that both kinds of iteration need; the arrays are of the ready and parallel."""

    rates: TierRates
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
    def of(cls, problem: BatchProblem, rates: TierRates) -> View:
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
        next_units = problem.num_blocks(num_cached + 1) * rates.units_per_block[tiers]
        step_seconds = decode_step_seconds(rates, tiers, num_cached)
        entries, rising = indices(may_rise), None
        if len(entries):
            least_pending = np.maximum(pending[entries], step_seconds)
            rising = Rising.of(problem, rates, entries, num_cached[entries], least_pending)
        held_units, grown_units = int(np.add.reduce(num_units)), int(np.add.reduce(next_units))
        return cls(
            rates=rates,
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


def decode_step_seconds(rates: TierRates, tiers: Tiers, num_cached: Ints) -> float:
    """Time of a decode of requests with these caches, by the cost model; always positive."""
    cost = rates.cost
    # Tokens by tier first: a product as long as the batch goes to threads that take milliseconds.
    tokens = np.bincount(tiers, num_cached, NUM_TIER_NUMBERS)
    cached = float(rates.seconds_per_cached @ tokens)
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


def hidden_cost_seconds(rates: TierRates, num_hurt: int, num_cached: Ints) -> Floats:
    """U * rho * m: what hidden caches of these lengths take off the value."""
    cost: Floats = num_hurt * (rates.extra_seconds[_HIDDEN] * num_cached)
    return cost


def has_place(problem: BatchProblem, rates: TierRates, room: int) -> bool:
    """Whether the shortest of the waiting could start in so many units, in the smallest tier."""
    least_units = rates.compact.units_per_block
    if not len(problem.waiting) or len(problem.running) >= problem.max_num_seqs:
        return False
    if room < least_units:  # known without looking at the lengths, and often so in overload
        return False
    shortest = int(np.minimum.reduce(problem.waiting.num_tokens))
    return (shortest + problem.block_size) // problem.block_size * least_units <= room
