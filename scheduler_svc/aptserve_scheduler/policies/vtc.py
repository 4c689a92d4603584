"""Fairness among tenants by virtual token counters (VTC, arXiv 2401.00588).

Each tenant has a counter of the service it got: 1 for an input token, when the request starts, and
2 for an output token, when it comes back. The next to start is always the oldest request of the
waiting tenant with the smallest counter. A tenant none of whose requests waits has its counter
lifted, when one arrives, to the smallest counter of those who do wait (of the last that waited, if
nobody does): time without requests earns no credit.

Choices that the source leaves open:

* Batches are chunked ones (:mod:`~aptserve_scheduler.policies.chunked`): fairness decides about
  starting, running requests go on as they do there, and short memory costs the latest arrival its
  own. The first request in turn that does not fit ends the batch.
* Recomputing a lost cache is not charged; tokens that a caller brings along count as input.
* Names are unbounded, so counters of tenants without any live request are only kept for the
  ``max_idle_tenants`` who left last. Whoever is forgotten is lifted like a new tenant.

Requests without a tenant share one. Priorities are ignored; within a tenant the order is that of
arrival. Nothing bounds the waiting of one request, but a tenant that waits falls behind no other
one by more than a batch and what is running, however much the others send.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Ints
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Decision,
    Horizon,
    Policy,
    Service,
    decodes_all_running,
)
from aptserve_scheduler.policies.chunked import chunked_batch
from aptserve_scheduler.policies.prediction import reaching

_NOBODY = 0
"""Number of the tenant of slots that hold no announced request."""


@dataclass(frozen=True, slots=True)
class VtcConfig:
    """Settings of the policy; ValueError names a field out of range."""

    input_weight: float = 1.0
    output_weight: float = 2.0
    token_budget: int = 512
    """Most tokens of an iteration; a worker's own limit may be lower."""
    max_idle_tenants: int = 4096

    def __post_init__(self) -> None:
        for name in ("input_weight", "output_weight"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("token_budget", "max_idle_tenants"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class VtcPolicy(Policy):
    """Chunked batches, started in the order of the tenants' counters; KV tier only."""

    name = "vtc"
    needs_history = True

    def __init__(self, config: VtcConfig | None = None) -> None:
        self.config = config or VtcConfig()
        self._tenants = _Tenants(self.config.max_idle_tenants)
        # By slot.
        self._tenant = np.zeros(0, np.int64)
        self._waits = np.zeros(0, np.bool_)
        self._is_charged = np.zeros(0, np.bool_)

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """A chunked batch; those who start in it are charged their input."""
        for candidates, waits in ((problem.running, False), (problem.waiting, True)):
            if len(candidates):
                self._reach(int(candidates.slots.max()))
                self._waits[candidates.slots] = waits
        turns = self._turns(problem)
        decision = chunked_batch(problem, turns, self.config.token_budget)
        if decision is not None:
            self._start(problem, turns, decision)
            self._waits[decision.preempted] = True
        return decision

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when all running decode, whoever's turn it becomes by the tokens they get."""
        if not decodes_all_running(problem, decision):
            return THIS_ITERATION
        waiting = problem.waiting
        heads = np.unique(self._tenant[waiting.slots], return_index=True)[1]
        if len(heads) > 1:
            shortest = heads[[np.argmin(waiting.num_tokens[heads])]]
            beside = chunked_batch(problem, shortest, self.config.token_budget)
            if beside is None or len(beside.slots) > len(problem.running):
                return THIS_ITERATION
        return Horizon()

    def arrived(self, arrival: Arrival) -> None:
        """A tenant that was not waiting starts to, and is lifted."""
        self._reach(arrival.slot)
        tenants, waiting = self._tenants, self._tenant[self._waits]
        tenant = tenants.enter(arrival.tenant)
        if not (waiting == tenant).any():
            tenants.lift(tenant, waiting)
        self._tenant[arrival.slot] = tenant
        self._waits[arrival.slot] = True
        self._is_charged[arrival.slot] = False

    def served(self, service: Service) -> None:
        """Charge output tokens."""
        used = self.config.output_weight * service.num_output_tokens
        np.add.at(self._tenants.counters, self._tenant[service.slots], used)

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        """One request less of its tenant."""
        tenant = int(self._tenant[slot])
        if self._waits[slot]:
            self._tenants.last_waiting = tenant
        self._tenant[slot] = _NOBODY
        self._waits[slot] = False
        self._tenants.leave(tenant)

    def counter_of(self, tenant: str) -> float | None:
        """Service that a tenant got, lifts included; ``None`` for one that is not known."""
        return self._tenants.counter_of(tenant)

    def _reach(self, slot: int) -> None:
        self._tenant = reaching(self._tenant, slot)
        self._waits = reaching(self._waits, slot)
        self._is_charged = reaching(self._is_charged, slot)

    def _turns(self, problem: BatchProblem) -> Ints:
        """Rows of ``waiting`` in the order of their turns, as far as the batch could reach."""
        waiting = problem.waiting
        budget = min(self.config.token_budget, problem.max_num_batched_tokens)
        tenant = self._tenant[waiting.slots]
        by_tenant = np.argsort(tenant, kind="stable")
        present, start, num = np.unique(tenant[by_tenant], return_index=True, return_counts=True)
        counters = self._tenants.counters[present]
        # Each turn moves one tenant back, so no more than the first so many can have one.
        first = np.lexsort((by_tenant[start], counters))[: problem.max_num_seqs]
        queue = [
            (counter, int(by_tenant[at]), at, at + length)
            for counter, at, length in zip(
                counters[first].tolist(), start[first].tolist(), num[first].tolist(), strict=True
            )
        ]
        turns: list[int] = []
        while queue and budget > 0 and len(turns) < problem.max_num_seqs:
            counter, row, at, end = queue[0]
            turns.append(row)
            budget -= int(waiting.num_tokens[row])
            at += 1
            if at < end:
                counter += self._charge(int(waiting.slots[row]), int(waiting.num_tokens[row]))
                heapq.heapreplace(queue, (counter, int(by_tenant[at]), at, end))
            else:
                heapq.heappop(queue)
        return np.array(turns, np.int64)

    def _charge(self, slot: int, num_input: int) -> float:
        return 0.0 if self._is_charged[slot] else self.config.input_weight * num_input

    def _start(self, problem: BatchProblem, turns: Ints, decision: Decision) -> None:
        waiting, tenants = problem.waiting, self._tenants
        is_chosen = np.isin(waiting.slots[turns], decision.slots)
        for row in turns[is_chosen].tolist():
            slot = int(waiting.slots[row])
            tenant = int(self._tenant[slot])
            tenants.counters[tenant] += self._charge(slot, int(waiting.num_tokens[row]))
            tenants.last_waiting = tenant
            self._is_charged[slot] = True
            self._waits[slot] = False


class _Tenants:
    """Tenants by number, with their counters."""

    def __init__(self, max_idle: int) -> None:
        self.counters = np.zeros(1, np.float64)
        self.last_waiting = _NOBODY
        """Whose request was the last to leave the queue."""
        self._max_idle = max_idle
        self._number_of: dict[str, int] = {}
        self._names = [""]
        self._num_live = [1]
        """Requests by number; the tenant of nobody never goes."""
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Tenants without requests, the longest idle first."""

    def enter(self, name: str) -> int:
        """Number of a tenant that has one request more."""
        number = self._number_of.get(name)
        if number is None:
            number = self._add(name)
        self._num_live[number] += 1
        self._idle.pop(number, None)
        return number

    def leave(self, number: int) -> None:
        """One request less; whoever is left without any may be forgotten."""
        self._num_live[number] -= 1
        if self._num_live[number]:
            return
        self._idle[number] = None
        if len(self._idle) > self._max_idle:
            self._forget_one()

    def lift(self, number: int, waiting: Ints) -> None:
        """Raise a counter to the smallest of those who wait, each named once or more."""
        if len(waiting):
            floor = float(self.counters[waiting].min())
        else:
            floor = float(self.counters[self.last_waiting])
        self.counters[number] = max(float(self.counters[number]), floor)

    def counter_of(self, name: str) -> float | None:
        number = self._number_of.get(name)
        return None if number is None else float(self.counters[number])

    def _add(self, name: str) -> int:
        number = self._free.pop() if self._free else len(self._names)
        if number == len(self._names):
            self._names.append(name)
            self._num_live.append(0)
        self._names[number] = name
        self._number_of[name] = number
        self.counters = reaching(self.counters, number)
        self.counters[number] = 0.0
        return number

    def _forget_one(self) -> None:
        # The one who waited last stays: its counter is what a new tenant may be lifted to.
        if self.last_waiting in self._idle:
            self._idle.move_to_end(self.last_waiting)
        number, _ = self._idle.popitem(last=False)
        del self._number_of[self._names[number]]
        self._free.append(number)
