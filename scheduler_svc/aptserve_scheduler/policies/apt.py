"""The paper's policy: adaptive scheduling over a hybrid cache (Apt-Serve, SIGMOD 2025).

Every iteration is either a prefill of waiting requests or a decode of running ones: a prefill when
the pending time of the waiting adds up to at least that of the running. Who takes part, and in
which tier, is the knapsack of :mod:`~aptserve_scheduler.policies.greedy` with

    value of request i in tier t = p_i - U * rho_t * m_i

p_i: pending seconds; U: all candidates, waiting and running, whom a slower iteration would hurt;
rho_t: extra seconds per cached token of tier t over KV; m_i: cached tokens of the request. The
value of a request that has missed its objectives is replaced by almost nothing.

Choices the paper leaves open:

* p_i is at least one decode step. A plain loop plans at the very moment tokens arrive, when nobody
  has waited yet, and every tier that costs anything would look worthless.
* A prefill leaves free what the next decode step will take, at least 1 % of the pool, while
  requests run. A prompt is given a block for its first token too.
* A promotion from hidden to KV uses memory that no running request needs, never another's.
* Running requests that are not chosen keep their memory unless the chosen ones need it.
* A tier is offered only if the request's longest cache would fit the empty pool in it.
* A prompt longer than the token budget runs alone, in chunks of the budget, before new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    BatchProblem,
    Bools,
    Candidates,
    Decision,
    Floats,
    Horizon,
    Ints,
    Policy,
    Tiers,
    decodes_all_running,
)
from aptserve_scheduler.policies.common import (
    Continuation,
    continue_prefills,
    indices,
    make_room_for_oldest,
)
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack, solve

Solver = Callable[[Knapsack], Ints]
"""From a knapsack to a choice within its limits; :func:`greedy.solve` is one."""

ALMOST_NOTHING = 1e-6
"""Factor on the value of a request that missed its objectives; order among the missed is kept."""
_NUM_TIER_NUMBERS = 128
_HIDDEN = int(Tier.HIDDEN)
HEADROOM = 0.01
"""Share of the pool that admissions and promotions leave free while requests run."""


class AptPolicy(Policy):
    """Prefill or decode, by pending time; requests and tiers by value per unit of memory."""

    name = "apt"

    def __init__(self, solver: Solver = solve) -> None:
        self._solver = solver

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """All of them."""
        return tiers

    def decide(self, problem: BatchProblem) -> Decision | None:
        """The preferred kind of iteration if anything can take part in it, else the other one."""
        view = _View.of(problem)
        kinds = (_prefill, _decode) if view.prefers_prefill else (_decode, _prefill)
        for kind in kinds:
            decision = kind(problem, view, self._solver)
            if decision is not None:
                return decision
        return make_room_for_oldest(problem)

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when all running decode in KV and nobody can start: what is free shrinks.

        A hidden cache may become worth promoting at any time.
        """
        in_kv = bool((problem.running.tiers == Tier.KV).all())
        if not in_kv or not decodes_all_running(problem, decision):
            return THIS_ITERATION
        room = problem.num_free_units - int(HEADROOM * problem.num_units)
        return THIS_ITERATION if _has_place(problem, room) else Horizon()


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """Figures that both kinds of iteration need."""

    ready: Ints
    """Rows of ``running`` that a decode can take."""
    waiting_seconds: float
    """Pending time of those without a first token: waiting, and prompts under way."""
    running_seconds: float
    num_waiting: int
    least_pending_seconds: float
    held_units: int
    """Units that the ready ones hold."""
    tiers: Tiers
    num_cached: Ints
    next_units: Ints
    """Units that each of them holds with one more token, in its tier."""
    grown_units: int
    """The sum of these."""
    headroom: int
    """Units to leave free for the next decode step."""

    @property
    def prefers_prefill(self) -> bool:
        return self.num_waiting > 0 and self.waiting_seconds >= self.running_seconds

    @property
    def comparison(self) -> str:
        """The rule's figures, for operators."""
        return (
            f"{self.num_waiting} waiting requests have {self.waiting_seconds:.3g} s pending "
            f"against {self.running_seconds:.3g} s of {len(self.ready)} running"
        )

    @classmethod
    def of(cls, problem: BatchProblem) -> _View:
        waiting, running = problem.waiting, problem.running
        one_left = running.num_remaining_tokens == 1
        ready = indices(running.schedulable & one_left)
        under_way = indices(running.schedulable & ~one_left)
        pending = running.pending_seconds
        tiers, num_cached = running.tiers[ready], running.num_computed_tokens[ready]
        held_units = int(running.num_units[ready].sum())
        next_units = problem.num_units_for(num_cached + 1, tiers)
        grown_units = int(next_units.sum())
        least_headroom = int(HEADROOM * problem.num_units) if len(running) else 0
        return cls(
            ready=ready,
            waiting_seconds=float(waiting.pending_seconds.sum() + pending[under_way].sum()),
            running_seconds=float(pending[ready].sum()),
            num_waiting=len(waiting) + len(under_way),
            least_pending_seconds=_decode_step_seconds(problem, tiers, num_cached),
            held_units=held_units,
            tiers=tiers,
            num_cached=num_cached,
            next_units=next_units,
            grown_units=grown_units,
            headroom=max(grown_units - held_units, least_headroom),
        )


def _decode_step_seconds(problem: BatchProblem, tiers: Tiers, num_cached: Ints) -> float:
    """Time of a decode of requests with these caches, by the cost model; always positive."""
    cost = problem.cost
    per_cached = np.zeros(_NUM_TIER_NUMBERS)
    for tier, seconds in cost.seconds_per_cached_token.items():
        per_cached[tier] = seconds
    cached = float(per_cached[tiers] @ num_cached)
    per_sequence = cost.seconds_per_token + cost.seconds_per_sequence
    return max(cost.base_seconds + per_sequence * len(tiers) + cached, 1e-9)


def _extra_seconds(problem: BatchProblem) -> Floats:
    """rho of each tier, by the tier's number: seconds per cached token beyond KV's, never < 0."""
    cost = problem.cost.seconds_per_cached_token
    rho = np.zeros(_NUM_TIER_NUMBERS)
    for tier in problem.tiers:
        rho[tier.tier] = max(0.0, cost.get(tier.tier, 0.0) - cost.get(Tier.KV, 0.0))
    return rho


def _values(
    problem: BatchProblem,
    pending: Floats,
    missed: Bools,
    extra: Floats,
    offered: Bools,
) -> Floats:
    """[k, n] value of n requests with k options each; see the head of this file.

    ``extra`` [k, n]: seconds that the option adds to the iteration; ``offered`` [k, n]: whether the
    request has the option. ``pending`` and ``missed`` are [n].
    """
    num_hurt = len(problem.waiting) + len(problem.running)
    values = pending - num_hurt * extra
    values *= np.where(missed, ALMOST_NOTHING, 1.0)
    values[~offered] = -np.inf
    # A request whose only options are worthless must still get its turn, in the smallest.
    hopeless = indices(values.max(axis=0) <= 0)
    if len(hopeless):
        smallest = np.argmax(offered[:, hopeless], axis=0)
        values[smallest, hopeless] = ALMOST_NOTHING * pending[hopeless]
    return values


def _prefill(problem: BatchProblem, view: _View, solver: Solver) -> Decision | None:
    waiting, running = problem.waiting, problem.running
    going_on = continue_prefills(problem)
    chosen, tiers = _choose_waiting(problem, view, going_on, solver)
    if len(chosen) + len(going_on.rows) == 0:
        return None
    new_tokens = np.minimum(waiting.num_tokens[chosen], problem.max_num_batched_tokens)
    num_tokens = np.concatenate([going_on.num_tokens, new_tokens])
    return Decision(
        slots=np.concatenate([running.slots[going_on.rows], waiting.slots[chosen]]),
        num_tokens=num_tokens,
        tiers=np.concatenate([running.tiers[going_on.rows], tiers]),
        reason=(
            f"prefill: {view.comparison}; {len(chosen)} start "
            f"({int(np.count_nonzero(tiers != Tier.KV))} not in KV), {len(going_on.rows)} go on, "
            f"{int(num_tokens.sum())} tokens, {problem.num_free_units} units were free"
        ),
    )


def _choose_waiting(
    problem: BatchProblem, view: _View, going_on: Continuation, solver: Solver
) -> tuple[Ints, Tiers]:
    """Rows of ``waiting`` to start, earliest arrival first, and their tiers."""
    waiting = problem.waiting
    seats = problem.max_num_seqs - len(problem.running)
    room = going_on.num_units_left - view.headroom
    if not going_on.num_tokens_left or not _has_place(problem, room):
        return np.zeros(0, np.int64), np.zeros(0, np.int8)
    offers = _by_size(problem)
    numbers = np.array([tier.tier for tier in offers], np.int8)
    values = _values(
        problem,
        np.maximum(waiting.pending_seconds, view.least_pending_seconds),
        waiting.missed,
        _extra_seconds(problem)[numbers, None] * waiting.num_tokens,
        np.stack([problem.fits_pool(waiting, tier) for tier in offers]),
    )
    per_block = np.array([tier.units_per_block for tier in offers], np.int64)
    num_units = per_block[:, None] * problem.num_blocks(waiting.num_tokens + 1)
    num_tokens = np.minimum(waiting.num_tokens, problem.max_num_batched_tokens)
    one_seat = np.ones((), np.int64)
    needs = (
        num_units,
        np.broadcast_to(num_tokens, values.shape),
        np.broadcast_to(one_seat, values.shape),
    )
    choice = solver(Knapsack(values, needs, (room, going_on.num_tokens_left, seats)))
    chosen = indices(choice != NOT_CHOSEN)
    return chosen, numbers[choice[chosen]]


def _has_place(problem: BatchProblem, room: int) -> bool:
    """Whether the shortest of the waiting could start in so many units, in the smallest tier."""
    if not len(problem.waiting) or len(problem.running) >= problem.max_num_seqs:
        return False
    num_blocks = (int(problem.waiting.num_tokens.min()) + problem.block_size) // problem.block_size
    return num_blocks * min(tier.units_per_block for tier in problem.tiers) <= room


def _by_size(problem: BatchProblem) -> list[TierSpec]:
    """Tiers by rising units per block; of equally large ones the fastest alone."""
    seconds = problem.cost.seconds_per_cached_token
    fastest: dict[int, TierSpec] = {}
    for tier in sorted(problem.tiers, key=lambda tier: seconds.get(tier.tier, 0.0)):
        fastest.setdefault(tier.units_per_block, tier)
    return [fastest[size] for size in sorted(fastest)]


def _decode(problem: BatchProblem, view: _View, solver: Solver) -> Decision | None:
    running, ready = problem.running, view.ready
    if not len(ready):
        return None
    room = problem.num_free_units + view.held_units
    is_chosen, tiers, num_units = _choose_running(problem, view, room, solver)
    chosen, idle = ready[is_chosen], ready[~is_chosen]
    if not len(chosen):
        return None
    missing = num_units + view.held_units - int(running.num_units[chosen].sum()) - room
    preempted = _least_worthy(running, idle, missing)
    num_promoted = int(np.count_nonzero(tiers != running.tiers[chosen]))
    return Decision(
        slots=running.slots[chosen],
        num_tokens=np.ones(len(chosen), np.int64),
        tiers=tiers,
        preempted=running.slots[preempted],
        reason=(
            f"decode: {view.comparison}; {len(chosen)} run "
            f"({int(np.count_nonzero(tiers != Tier.KV))} not in KV, {num_promoted} promoted), "
            f"{len(idle) - len(preempted)} sit out, {len(preempted)} lose their memory"
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Hidden:
    """Those of the ready that are hidden and would fit the pool in KV; parallel arrays."""

    entries: Ints
    """Entries of ``ready``."""
    cost: Floats
    """U * rho * m: what staying hidden takes off the value."""
    least_more_units: int
    """What being promoted takes of the shortest beyond what its next token does."""

    @classmethod
    def of(cls, problem: BatchProblem, view: _View) -> _Hidden:
        running, kv = problem.running, problem.tiers[0]
        entries = indices(view.tiers == _HIDDEN)
        if len(entries):
            entries = entries[problem.fits_pool(running, kv)[view.ready[entries]]]
        if not len(entries):
            return cls(entries, np.zeros(0, np.float64), 0)
        num_cached = view.num_cached[entries]
        extra: Floats = _extra_seconds(problem)[_HIDDEN] * num_cached
        num_hurt = len(problem.waiting) + len(running)
        shortest = int(num_cached.argmin())
        num_blocks = int(num_cached[shortest]) // problem.block_size + 1
        return cls(
            entries=entries,
            cost=num_hurt * extra,
            least_more_units=(
                num_blocks * kv.units_per_block - int(view.next_units[entries[shortest]])
            ),
        )

    def lack(self, spare: int) -> bool:
        """Whether so many units are too few to promote any of them."""
        return not len(self.entries) or self.least_more_units > spare

    def are_worth(self, pending: Floats) -> Bools:
        """[n] over all the ready, with their pending time: whose value as he is is positive.

        That of the others is, as nothing is taken off it.
        """
        worth = np.ones(len(pending), np.bool_)
        worth[self.entries] = pending[self.entries] > self.cost
        return worth


def _choose_running(
    problem: BatchProblem, view: _View, room: int, solver: Solver
) -> tuple[Bools, Tiers, int]:
    """Which of the ready rows to decode; the tiers of those, and the units they will hold.

    Two options each: the tier held, and for hidden ones KV.
    """
    running, ready, held = problem.running, view.ready, view.tiers
    pending = np.maximum(running.pending_seconds[ready], view.least_pending_seconds)
    seats = min(problem.max_num_seqs, problem.max_num_batched_tokens)
    spare = max(0, room - view.grown_units - view.headroom)
    hidden = _Hidden.of(problem, view)
    if hidden.lack(spare):
        worth = hidden.are_worth(pending)
        num_needed = int(view.next_units @ worth)
        if num_needed <= room and 0 < np.count_nonzero(worth) <= seats:
            # All of them fit in the only tier that is left to each.
            return worth, held[worth], num_needed

    tiers, offered = held[None], np.ones((1, len(ready)), np.bool_)
    num_units = view.next_units[None]
    num_cached = view.num_cached
    if len(hidden.entries):
        in_kv = np.full_like(held, Tier.KV)
        tiers = np.stack([held, in_kv])
        offered = np.stack([offered[0], np.zeros_like(offered[0])])
        offered[1, hidden.entries] = True
        num_units = np.stack([num_units[0], problem.num_units_for(num_cached + 1, in_kv)])
    extra = _extra_seconds(problem)[tiers] * num_cached
    values = _values(problem, pending, running.missed[ready], extra, offered)

    one_seat = np.broadcast_to(np.ones((), np.int64), values.shape)
    needs = (num_units, one_seat, num_units - num_units[0])
    choice = solver(Knapsack(values, needs, (room, seats, spare)))
    if (choice == NOT_CHOSEN).all():
        # Hidden caches that are not worth their time and cannot be promoted: better slow than not.
        held_only = Knapsack(pending[None], tuple(need[:1] for need in needs), (room, seats, spare))
        choice = solver(held_only)
    is_chosen = choice != NOT_CHOSEN
    rows = indices(is_chosen)
    options = choice[rows]
    return is_chosen, tiers[options, rows], int(num_units[options, rows].sum())


def _least_worthy(running: Candidates, rows: Ints, num_missing_units: int) -> Ints:
    """Those of some running requests that give up their memory so that enough comes free.

    Least pending time per unit first, the missed before all others, of equals the latest arrival.
    """
    if num_missing_units <= 0:
        return rows[:0]
    worth = running.pending_seconds[rows] / running.num_units[rows]
    worth[running.missed[rows]] *= ALMOST_NOTHING
    order = rows[np.lexsort((-rows, worth))]
    freed = np.cumsum(running.num_units[order])
    return order[: int(np.searchsorted(freed, num_missing_units)) + 1]
