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

import math
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints, indices
from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Candidates,
    Decision,
    Horizon,
    Policy,
    Service,
    decodes_all_running,
)
from aptserve_scheduler.policies.prediction import reaching
from aptserve_scheduler.policies.ranked import Everyone, FirstInLine, ranked_batch

_ROUNDING = 1e-9
_ROUNDING_SECONDS = 1e-6


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
        everyone = Everyone(problem)
        self._reach(int(everyone.slots.max(initial=0)))
        self._join(everyone, problem.cost, problem.now)
        self._promote_starving(everyone, problem.now)
        return ranked_batch(problem, everyone, self._queue[everyone.slots])

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """As long as all running decode and the first in line does not fit.

        That is, until a quantum is used up, or somebody who starves comes before it.
        """
        if not decodes_all_running(problem, decision):
            return THIS_ITERATION
        waiting = problem.waiting
        if not len(waiting):
            return Horizon()
        first = FirstInLine.of(problem, self._queue[waiting.slots])
        demotions = self._seconds_to(problem.running.slots, first.levels_behind())
        fits_at = problem.now + first.fits_at(demotions)
        rivals = first.overtakers(np.zeros(len(waiting), np.int64))
        starve_at = self._served_at[waiting.slots[rivals]] + self.config.starving_seconds
        until = min(fits_at, float(starve_at.min(initial=math.inf)))
        return Horizon(until=until - _ROUNDING_SECONDS)

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
        if slot < len(self._queue):
            return
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

    def _seconds_to(self, slots: Ints, queues: Ints) -> Floats:
        """[n] service that each still needs to be in a queue or one further down."""
        entry = self._entry[slots]
        # One that was promoted stays at the top for the quantum of the queue it came from.
        reached = np.maximum(queues, entry + 1)
        # Twice the tolerance of ``served``, which must not find that it was reached any sooner.
        quanta = np.exp2(reached - 2 * _ROUNDING) - np.exp2(entry)
        seconds = self.config.quantum_seconds * quanta - self._service_seconds[slots]
        seconds[reached >= self.config.num_queues] = np.inf
        seconds[self._queue[slots] >= queues] = 0.0
        return np.maximum(seconds, 0.0)

    def _promote_starving(self, candidates: Candidates, now: float) -> None:
        slots = candidates.slots[candidates.schedulable]
        starves = now - self._served_at[slots] >= self.config.starving_seconds
        starving = slots[starves & (self._queue[slots] > 0)]
        if not len(starving):
            return
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
