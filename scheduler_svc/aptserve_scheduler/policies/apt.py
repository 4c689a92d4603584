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
from typing import NamedTuple

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, indices
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.apt_horizon import horizon_of
from aptserve_scheduler.policies.apt_view import (
    View,
    has_place,
    most_decodes,
    num_hurt,
)
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    BatchProblem,
    Candidates,
    Decision,
    Horizon,
    Policy,
)
from aptserve_scheduler.policies.common import Continuation, continue_prefills, make_room_for_oldest
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack, solve
from aptserve_scheduler.policies.tier_rates import TierRates

Solver = Callable[[Knapsack], Ints]
"""From a knapsack to a choice within its limits; :func:`greedy.solve` is one."""

ALMOST_NOTHING = 1e-6
"""Factor on the value of a request that missed its objectives; order among the missed is kept."""
_KV = int(Tier.KV)


class AptPolicy(Policy):
    """Prefill or decode, by pending time; requests and tiers by value per unit of memory."""

    name = "apt"

    def __init__(self, solver: Solver = solve) -> None:
        self._solver = solver
        self._view: View | None = None
        """Of the latest decision."""

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """All of them."""
        return tiers

    def decide(self, problem: BatchProblem) -> Decision | None:
        """The preferred kind of iteration if anything can take part in it, else the other one."""
        last = self._view
        view = View.of(problem, TierRates.of(problem, last and last.rates))
        self._view = view
        kinds = (_prefill, _decode) if view.prefers_prefill else (_decode, _prefill)
        for kind in kinds:
            decision = kind(problem, view, self._solver)
            if decision is not None:
                return decision
        return make_room_for_oldest(problem)

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """See :mod:`~aptserve_scheduler.policies.apt_horizon`."""
        return THIS_ITERATION if self._view is None else horizon_of(problem, self._view, decision)


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
    values = pending - num_hurt(problem) * extra
    values *= np.where(missed, ALMOST_NOTHING, 1.0)
    values[~offered] = -np.inf
    # A request whose only options are worthless must still get its turn, in the smallest.
    hopeless = indices(values.max(axis=0) <= 0)
    if len(hopeless):
        smallest = np.argmax(offered[:, hopeless], axis=0)
        values[smallest, hopeless] = ALMOST_NOTHING * pending[hopeless]
    return values


def _prefill(problem: BatchProblem, view: View, solver: Solver) -> Decision | None:
    if not view.num_under_way and not has_place(
        problem, view.rates, problem.num_free_units - view.headroom
    ):
        return None
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
            f"({np.count_nonzero(tiers != _KV)} not in KV), {len(going_on.rows)} go on, "
            f"{int(num_tokens.sum())} tokens, {problem.num_free_units} units were free"
        ),
    )


def _choose_waiting(
    problem: BatchProblem, view: View, going_on: Continuation, solver: Solver
) -> tuple[Ints, Tiers]:
    """Rows of ``waiting`` to start, earliest arrival first, and their tiers."""
    waiting = problem.waiting
    seats = problem.max_num_seqs - len(problem.running)
    room = going_on.num_units_left - view.headroom
    if not going_on.num_tokens_left or not has_place(problem, view.rates, room):
        return np.zeros(0, np.int64), np.zeros(0, np.int8)
    offers = _by_size(problem)
    numbers = np.array([tier.tier for tier in offers], np.int8)
    values = _values(
        problem,
        np.maximum(waiting.pending_seconds, view.least_pending_seconds),
        waiting.missed,
        view.rates.extra_seconds[numbers, None] * waiting.num_tokens,
        np.stack([problem.fits_pool(waiting, tier) for tier in offers]),
    )
    per_block = view.rates.units_per_block[numbers]
    num_units = per_block[:, None] * problem.num_blocks(waiting.num_tokens + 1)
    num_tokens = np.minimum(waiting.num_tokens, problem.max_num_batched_tokens)
    needs = (num_units, np.broadcast_to(num_tokens, values.shape), _one_seat_each(values))
    choice = solver(Knapsack(values, needs, (room, going_on.num_tokens_left, seats)))
    chosen = indices(choice != NOT_CHOSEN)
    return chosen, numbers[choice[chosen]]


def _one_seat_each(values: Floats) -> Ints:
    return np.broadcast_to(np.ones((), np.int64), values.shape)


def _by_size(problem: BatchProblem) -> list[TierSpec]:
    """Tiers by rising units per block; of equally large ones the fastest alone."""
    seconds = problem.cost.seconds_per_cached_token
    fastest: dict[int, TierSpec] = {}
    for tier in sorted(problem.tiers, key=lambda tier: seconds.get(tier.tier, 0.0)):
        fastest.setdefault(tier.units_per_block, tier)
    return [fastest[size] for size in sorted(fastest)]


class _Batch(NamedTuple):
    """Which of the ready decode."""

    entries: Ints
    """Entries of the view's arrays."""
    tiers: Tiers
    """Tier of each from now on."""
    num_units: int
    """Units that they hold then."""


def _decode(problem: BatchProblem, view: View, solver: Solver) -> Decision | None:
    running, num_ready = problem.running, len(view.ready)
    if not num_ready:
        return None
    spare = max(0, problem.num_free_units + view.held_units - view.grown_units - view.headroom)
    batch = _as_they_are(problem, view, spare)
    if batch is None:
        batch = _by_knapsack(problem, view, spare, solver)
    num_chosen = len(batch.entries)
    if not num_chosen:
        return None
    missing = batch.num_units - int(np.add.reduce(view.num_units[batch.entries]))
    missing -= problem.num_free_units
    preempted = running.slots[:0]
    if missing > 0:
        idle = np.delete(view.ready, batch.entries)
        preempted = running.slots[_least_worthy(running, idle, missing)]
    num_promoted = np.count_nonzero(batch.tiers != view.tiers[batch.entries])
    return Decision(
        slots=running.slots[view.ready[batch.entries]],
        num_tokens=np.ones(num_chosen, np.int64),
        tiers=batch.tiers,
        preempted=preempted,
        reason=(
            f"decode: {view.comparison}; {num_chosen} run "
            f"({np.count_nonzero(batch.tiers != _KV)} not in KV, {num_promoted} promoted), "
            f"{num_ready - num_chosen - len(preempted)} sit out, "
            f"{len(preempted)} lose their memory"
        ),
    )


def _as_they_are(problem: BatchProblem, view: View, spare: int) -> _Batch | None:
    """All whose value in the tier they hold is positive, if that is what the knapsack would choose.

    It is when no promotion fits into the spare units, and all of them fit, at least one: then each
    has a single option left.
    """
    rising = view.rising
    if rising is None:
        entries, num_units = np.arange(len(view.ready)), view.grown_units
    elif rising.least_more_units <= spare:
        return None
    else:
        # Nothing is taken off the value of the others.
        is_chosen = ~view.may_rise
        is_chosen[rising.entries] = rising.are_worth
        entries = indices(is_chosen)
        num_units = int(np.add.reduce(view.next_units[entries]))
    is_batch = 0 < len(entries) <= most_decodes(problem)
    if num_units > problem.num_free_units + view.held_units or not is_batch:
        return None
    return _Batch(entries, view.tiers[entries], num_units)


def _by_knapsack(problem: BatchProblem, view: View, spare: int, solver: Solver) -> _Batch:
    """Two options each: the tier held, and for hidden ones KV, as far as the spare units reach."""
    running, ready, held = problem.running, view.ready, view.tiers
    pending = np.maximum(view.pending_seconds, view.least_pending_seconds)
    limits = (
        problem.num_free_units + view.held_units,
        most_decodes(problem),
        spare,
    )
    tiers, offered = held[None], np.ones((1, len(ready)), np.bool_)
    num_units = view.next_units[None]
    if view.rising is not None:
        kv = problem.tiers[0]
        tiers = np.stack([held, np.full_like(held, _KV)])
        offered = np.stack([offered[0], view.may_rise])
        in_kv = problem.num_blocks(view.num_cached + 1) * kv.units_per_block
        num_units = np.stack([num_units[0], in_kv])
    extra = view.rates.extra_seconds[tiers] * view.num_cached
    values = _values(problem, pending, running.missed[ready], extra, offered)

    needs = (num_units, _one_seat_each(values), num_units - num_units[0])
    choice = solver(Knapsack(values, needs, limits))
    if (choice == NOT_CHOSEN).all():
        # Hidden caches that are not worth their time and cannot be promoted: better slow than not.
        held_only = Knapsack(pending[None], tuple(need[:1] for need in needs), limits)
        choice = solver(held_only)
    entries = indices(choice != NOT_CHOSEN)
    options = choice[entries]
    return _Batch(entries, tiers[options, entries], int(num_units[options, entries].sum()))


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
