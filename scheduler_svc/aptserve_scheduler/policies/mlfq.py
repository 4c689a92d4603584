"""A skip-join multi-level feedback queue: the rule of FastServe (arXiv 2305.05920, NSDI 2026).

Queue p has a quantum of 10 ms * 2^p of service; a request's service is the time of the iterations
that it takes part in. A request joins the first queue whose quantum covers its predicted prefill,
so that long prompts skip the queues that they would only pass through. Service beyond the quantum
demotes it. A request that has not been served for 3 s is promoted to the top. The batch is composed
anew in every iteration, from the top queue down, by arrival within a queue.

Choices that the source leaves open, or that differ here:

* FastServe swaps caches of low queues to the host and back. There is no such tier here: a request
  whose memory goes to a higher queue is recomputed when its turn comes again.
* So that recomputing pays, a promoted request brings along the quantum of the queue it comes from,
  and goes on below that one. With the quantum of the top queue, requests that starve would take
  turns at recomputing their caches for one token each.
* Service counts as it adds up: what a request overran one quantum by is taken off the next. It
  leaves queue p after 10 ms * (2^(p + 1) - 2^s) seconds since it joined queue s, or was promoted
  from there. The last queue has no end.
* A demotion waits for the token under way. Otherwise a prompt that takes several iterations could
  lose its memory, and all its work, again and again.
* Prompts and decodes share a batch, within the worker's own limits; a prompt that does not fit the
  tokens left goes in chunks. Caches are KV only.

A priority of n lets a request join n queues further up (or down, if negative). Tenants are ignored.
Waiting is bounded as FastServe bounds it: 3 s without service lead to the top queue, where only
earlier arrivals come before. Each promotion brings at least one token and twice the service of the
one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Bools,
    Candidates,
    Decision,
    Floats,
    Horizon,
    Ints,
    Policy,
    Service,
    decodes_everyone,
)
from aptserve_scheduler.policies.chunked import shares
from aptserve_scheduler.policies.common import indices, make_room_for_oldest
from aptserve_scheduler.policies.fcfs import WATERMARK
from aptserve_scheduler.policies.prediction import reaching

_ROUNDING = 1e-9
_MOST_PASSES = 8
"""Times that the memory is shared out anew after somebody did not fit; then the rest loses it."""


@dataclass(frozen=True, slots=True)
class MlfqConfig:
    """Settings of the policy; ValueError names a field out of range."""

    quantum_seconds: float = 0.01
    """Service in the top queue; each further queue has twice that of the one before."""
    num_queues: int = 16
    starving_seconds: float = 3.0
    """Time without service after which a request is promoted to the top."""

    def __post_init__(self) -> None:
        for name in ("quantum_seconds", "starving_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if not 1 <= self.num_queues <= 48:
            raise ValueError(f"num_queues must be from 1 to 48, not {self.num_queues}")


class MlfqPolicy(Policy):
    """Little served requests first, in queues of doubling quanta; KV tier only."""

    name = "mlfq"
    needs_history = True

    def __init__(self, config: MlfqConfig | None = None) -> None:
        self.config = config or MlfqConfig()
        # By slot; ``queue`` and what follows mean nothing before a request has joined.
        self._has_joined = np.zeros(0, np.bool_)
        self._entry = np.zeros(0, np.int64)
        """Queue whose quantum the present service is counted from."""
        self._queue = np.zeros(0, np.int64)
        self._service_seconds = np.zeros(0, np.float64)
        self._served_at = np.zeros(0, np.float64)

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """Whom to serve, from the top queue down."""
        for candidates in (problem.running, problem.waiting):
            if len(candidates):
                self._reach(int(candidates.slots.max()))
                self._join(candidates, problem.cost, problem.now)
                self._promote_starving(candidates, problem.now)
        return ranked_batch(
            problem, self._queue[problem.running.slots], self._queue[problem.waiting.slots]
        )

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when everyone decodes: queues then decide about the batch\'s order alone."""
        return Horizon() if decodes_everyone(problem, decision) else THIS_ITERATION

    def arrived(self, arrival: Arrival) -> None:
        """It joins a queue when it is first seen beside a worker, whose speed decides which."""
        self._reach(arrival.slot)
        self._has_joined[arrival.slot] = False

    def served(self, service: Service) -> None:
        """Time is used up; whoever got a token may move down for it."""
        if not len(service.slots):
            return
        self._reach(int(service.slots.max()))
        self._service_seconds[service.slots] += service.seconds
        self._served_at[service.slots] = service.now
        slots = service.slots[service.num_output_tokens > 0]
        quanta = self._service_seconds[slots] / self.config.quantum_seconds
        # The sum of the same seconds may differ by rounding, depending on how they came.
        entry = self._entry[slots]
        queue = np.floor(np.log2(quanta + np.exp2(entry)) + _ROUNDING)
        queue = np.minimum(queue, self.config.num_queues - 1).astype(np.int64)
        self._queue[slots] = np.where(queue > entry, queue, self._queue[slots])

    def _reach(self, slot: int) -> None:
        self._has_joined = reaching(self._has_joined, slot)
        self._entry = reaching(self._entry, slot)
        self._queue = reaching(self._queue, slot)
        self._service_seconds = reaching(self._service_seconds, slot)
        self._served_at = reaching(self._served_at, slot)

    def _join(self, candidates: Candidates, cost: CostCoefficients, now: float) -> None:
        new = indices(~self._has_joined[candidates.slots])
        if not len(new):
            return
        prefill = prefill_seconds(cost, candidates)[new]
        with np.errstate(divide="ignore"):  # a worker that advertises no cost at all: the top
            queue = np.ceil(np.log2(prefill / self.config.quantum_seconds))
        queue = np.clip(queue - candidates.priorities[new], 0, self.config.num_queues - 1)
        self._enter(candidates.slots[new], queue.astype(np.int64), now)
        self._served_at[candidates.slots[new]] -= candidates.pending_seconds[new]
        self._has_joined[candidates.slots[new]] = True

    def _promote_starving(self, candidates: Candidates, now: float) -> None:
        slots = candidates.slots[candidates.schedulable]
        starves = now - self._served_at[slots] >= self.config.starving_seconds
        starving = slots[starves & (self._queue[slots] > 0)]
        self._enter(starving, self._queue[starving], now)
        self._queue[starving] = 0

    def _enter(self, slots: Ints, queue: Ints, now: float) -> None:
        self._entry[slots] = self._queue[slots] = queue
        self._service_seconds[slots] = 0.0
        self._served_at[slots] = now


def prefill_seconds(cost: CostCoefficients, candidates: Candidates) -> Floats:
    """[n] predicted time of computing what each has left in one iteration of its own."""
    num_new = candidates.num_remaining_tokens
    pairs = num_new * (candidates.num_computed_tokens + 0.5 * num_new)
    seconds: Floats = (
        cost.base_seconds
        + cost.seconds_per_sequence
        + cost.seconds_per_token * num_new
        + cost.seconds_per_attention_pair * pairs
    )
    return seconds


def ranked_batch(
    problem: BatchProblem, running_levels: Ints, waiting_levels: Ints
) -> Decision | None:
    """A batch by rank with preemption: the lowest level first, by arrival within a level.

    Tokens, seats and memory go to running and waiting requests alike in that order. A waiting
    request that cannot have the memory for all its tokens even from those ranked below lets no
    other one in before it; running ones go on in what is left. Whose memory is needed loses it,
    the last in rank first; whoever gets no tokens keeps it otherwise. Caches are KV only.
    """
    running, waiting = problem.running, problem.waiting
    room = _Room.of(problem)
    line = _line_up(problem, np.concatenate([running_levels, waiting_levels]), room)
    is_running = line < len(running)
    computed = np.concatenate([running.num_computed_tokens, waiting.num_computed_tokens])[line]
    num_tokens = np.concatenate([running.num_tokens, waiting.num_tokens])[line]
    slots = np.concatenate([running.slots, waiting.slots])[line]
    chunks = shares(num_tokens - computed, problem.max_num_batched_tokens)
    chunks[np.cumsum(chunks > 0) > problem.max_num_seqs] = 0
    units = problem.num_blocks(computed + chunks) * problem.tiers[0].units_per_block
    kept = _kept(units, is_running | (chunks > 0), room)
    chosen, preempted = kept & (chunks > 0), is_running & ~kept
    if not chosen.any():
        return make_room_for_oldest(problem)
    num_chosen, num_new = int(chosen.sum()), int((chosen & ~is_running).sum())
    return Decision(
        slots=slots[chosen],
        num_tokens=chunks[chosen],
        tiers=np.full(num_chosen, Tier.KV, np.int8),
        preempted=slots[preempted],
        reason=(
            f"by rank: {num_chosen - num_new} of {len(running)} running requests and {num_new} "
            f"of {len(waiting)} waiting ones get {int(chunks[chosen].sum())} tokens, "
            f"{int(preempted.sum())} of the lowest ranks lose their memory"
        ),
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """What there is to share out, after requests whose end is in flight: they keep theirs."""

    num_units: int
    num_seats: int
    """Most requests that may hold memory."""
    headroom: int
    """Units that new requests leave free while others run."""

    @classmethod
    def of(cls, problem: BatchProblem) -> _Room:
        running = problem.running
        ending = ~running.schedulable
        seats = max(problem.max_num_seqs, len(running)) - int(np.count_nonzero(ending))
        return cls(
            num_units=problem.num_units - int(running.num_units[ending].sum()),
            num_seats=seats,
            headroom=int(WATERMARK * problem.num_units) if len(running) else 0,
        )


def _line_up(problem: BatchProblem, levels: Ints, room: _Room) -> Ints:
    """Rows of running, then waiting, requests in rank order.

    From the first on for which there can be no room, only running ones.
    """
    running, waiting = problem.running, problem.waiting
    ages = np.concatenate([running.age_seconds, waiting.age_seconds])
    order = np.lexsort((-ages, levels))
    order = order[np.concatenate([running.schedulable, waiting.schedulable])[order]]
    is_running: Bools = order < len(running)
    num_tokens = np.concatenate([running.num_tokens, waiting.num_tokens])[order]
    needs = np.cumsum(problem.num_blocks(num_tokens) * problem.tiers[0].units_per_block)
    fits = needs <= room.num_units - np.where(is_running, 0, room.headroom)
    fits[room.num_seats :] = False
    num_fitting = len(order) if fits.all() else int(np.argmin(fits))
    line: Ints = order[is_running | (np.arange(len(order)) < num_fitting)]
    return line


def _kept(units: Ints, takes_seat: Bools, room: _Room) -> Bools:
    """Who holds the memory he is to hold; those in front first, the others as they fit."""
    kept: Bools = np.cumsum(takes_seat) <= room.num_seats
    for _ in range(_MOST_PASSES):
        used = np.cumsum(np.where(kept, units, 0))
        is_over = used > room.num_units
        if not is_over.any():
            return kept
        first = int(np.argmax(is_over))
        left = room.num_units - int(used[first] - units[first])
        kept[first:] &= units[first:] <= left
    return kept & (np.cumsum(np.where(kept, units, 0)) <= room.num_units)
