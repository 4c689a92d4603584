"""What a policy sees and what it answers.

A policy has no clock and does no I/O, so that equal events give equal plans, live and simulated.
Most are pure functions of a :class:`BatchProblem`. One that must remember (service received, what
tenants used, how long answers turned out) learns it from the core through the methods ``arrived``,
``served`` and ``ended``. Imports of the core are for types only: the core imports this module.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers

if TYPE_CHECKING:
    from aptserve_scheduler.core.types import CostCoefficients, TierSpec

Members = Callable[[float, Ints, Floats], Bools]
"""Who of the running decodes, from the time and of each the cached tokens and the time of the
latest token; arrays are [n]."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Requests as parallel arrays of one length n, earliest arrival first. Read only."""

    slots: Ints
    """Handle of each request, to be named in the decision."""
    pending_seconds: Floats
    """Time since the last token, since arrival before the first."""
    num_tokens: Ints
    """Length: prompt, output, and tokens that plans in flight will sample."""
    num_computed_tokens: Ints
    """Tokens whose cache exists, or will once the plans in flight have run."""
    max_num_tokens: Ints
    """Length at which the request ends at the latest: prompt plus most output tokens."""
    num_units: Ints
    """Units held; 0 for waiting requests."""
    tiers: Tiers
    """Tier of the cache held; 0 for waiting requests."""
    schedulable: Bools
    """False while only a result in flight can say whether the request goes on."""
    miss_after_seconds: Floats
    """Pending time beyond which the request would not meet its objectives if its wait ended then;
    infinite while one slow token is forgiven, negative once the objectives are lost in any case."""
    missed: Bools
    """The request would not meet its objectives if its wait ended now."""
    ttft_seconds: Floats
    """Objective for the time to first token."""
    tbt_seconds: Floats
    """Objective for the P99 of the times between tokens."""
    age_seconds: Floats
    """Time since arrival."""
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    """Output tokens received so far; those in flight are not among them."""
    priorities: Ints
    """As the caller gave it; 0 is normal, higher is more urgent."""
    expected_output_tokens: Ints
    """The caller's guess of the output length; 0 for none."""

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_remaining_tokens(self) -> Ints:
        """Tokens to compute until the next one is sampled; at least 1."""
        return self.num_tokens - self.num_computed_tokens

    def with_schedulable(self, schedulable: Bools) -> Candidates:
        """The same requests, but for who of them could be scheduled."""
        columns = {column.name: getattr(self, column.name) for column in fields(Candidates)}
        return Candidates(**{**columns, "schedulable": schedulable})


@dataclass(frozen=True, slots=True, eq=False)
class BatchProblem:
    """One worker's next iteration: who could run, and within which limits."""

    now: float
    worker: int
    """Number of the worker, its own as long as the worker is attached."""
    num_units: int
    """Units in the worker's pool."""
    num_free_units: int
    """Units nobody holds."""
    block_size: int
    """Tokens per block."""
    tiers: tuple[TierSpec, ...]
    """Tiers that the policy may choose from, KV first."""
    max_num_seqs: int
    """Most requests in the batch."""
    max_num_batched_tokens: int
    """Most tokens computed in the batch."""
    cost: CostCoefficients
    """Present estimate of the worker's speed."""
    waiting: Candidates
    """Requests without memory that this worker could hold; all schedulable."""
    running: Candidates
    """Requests that hold memory on this worker."""

    def num_blocks(self, num_tokens: Ints) -> Ints:
        """Blocks that caches of these lengths take."""
        return (num_tokens + (self.block_size - 1)) // self.block_size

    def num_units_for(self, num_tokens: Ints, tiers: Tiers) -> Ints:
        """Units that caches of these lengths take in these tiers."""
        units_per_block = np.zeros(128, np.int64)
        for tier in self.tiers:
            units_per_block[tier.tier] = tier.units_per_block
        return self.num_blocks(num_tokens) * units_per_block[tiers]

    def fits_pool(self, candidates: Candidates, tier: TierSpec) -> Bools:
        """Whether each request's longest possible cache fits the empty pool in a tier.

        Only such tiers are sound for a request: in any other it could grow until it can neither
        run on nor make room.
        """
        longest = self.num_units // tier.units_per_block * self.block_size
        return candidates.max_num_tokens <= longest


def _no_slots() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What to run. The core checks it against every limit and raises ``PolicyError``."""

    slots: Ints
    """Chosen requests in batch order, at least one."""
    num_tokens: Ints
    """Tokens to compute for each; 1 up to what the request has left."""
    tiers: Tiers
    """Tier for each. A running request keeps its own, or goes from hidden to KV: a promotion."""
    reason: str
    """One sentence with numbers, for operators."""
    preempted: Ints = field(default_factory=_no_slots)
    """Running requests that lose their memory, for the chosen ones to have it."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that was accepted. ``slot`` is its handle until it ends."""

    slot: int
    now: float
    tenant: str
    priority: int
    num_prompt_tokens: int
    num_resumed_tokens: int
    """Output tokens that the caller brought along."""
    max_tokens: int
    expected_output_tokens: int | None
    """The caller's guess; ``None`` without one."""


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """What live requests got from an iteration, or from a run of equal ones; parallel arrays."""

    slots: Ints
    num_new_tokens: Ints
    """Tokens computed for each."""
    num_output_tokens: Ints
    """Of those, the output tokens that came back."""
    seconds: float
    """Time that the worker took."""
    now: float


@dataclass(frozen=True, slots=True)
class Horizon:
    """How far ahead a policy knows what it will decide: as it just did, or by a simple rule.

    It speaks of the iterations that follow while nothing happens but time passing: nobody arrives
    or ends, no guess of the cost changes, and the growing caches fit what is free now.
    """

    num_iterations: float = math.inf
    """The one decided for and those that follow it with the same decision."""
    until: float = math.inf
    """Those that follow must be decided for before this time."""
    while_late_alike: bool = False
    """Those that follow must find the objectives lost, ``miss_after_seconds < 0``, of the same
    running requests as now."""
    members: Members | None = None
    """Those that follow decode whom this names, as long as it names anybody, and so did this one.
    Where it is given it stands for all of the above."""


THIS_ITERATION = Horizon(num_iterations=1)
"""The next decision may be another."""


class Policy(ABC):
    """A rule that composes batches."""

    name: str
    """Name in the registry."""
    needs_history: bool = False
    """Whether ``arrived`` and ``ended`` are to be called, and ``served`` if it is overridden."""
    is_oracle: bool = False
    """Whether the policy takes ``expected_output_tokens`` for the truth; a simulator, which knows
    it, then fills it in."""

    @property
    def follows_service(self) -> bool:
        """Whether ``served`` is to be called: with ``needs_history``, if the policy has its own."""
        return self.needs_history and type(self).served is not Policy.served

    @abstractmethod
    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """Those of a worker's tiers that the policy chooses from, at least KV."""

    @abstractmethod
    def decide(self, problem: BatchProblem) -> Decision | None:
        """Compose a batch; ``None`` when nothing can run before a result comes back."""

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """What the policy would go on deciding if nothing happened but time passing.

        Asked about its own latest decision, one that computes a token for each chosen request,
        none of which changes its tier. A simulator skips ahead by the answer.
        """
        return THIS_ITERATION

    def arrived(self, arrival: Arrival) -> None:  # noqa: B027 - most policies need no history
        """A request was accepted."""

    def served(self, service: Service) -> None:  # noqa: B027
        """A worker computed tokens; requests that end by it are still named."""

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:  # noqa: B027
        """A request is over, and its slot free for another. ``completed``: not aborted or failed.

        It may have been waiting or running; ``num_output_tokens`` counts resumed tokens too.
        """


def decodes_everyone(problem: BatchProblem, decision: Decision) -> bool:
    """Whether nobody waits and each running request is chosen for one token, as it is.

    Most policies then have nothing left to decide.
    """
    return not len(problem.waiting) and decodes_all_running(problem, decision)


def decodes_all_running(problem: BatchProblem, decision: Decision) -> bool:
    """Whether each running request is chosen for one token, as it is, whoever waits.

    A policy that admits by order of arrival and memory alone repeats that: who does not fit now
    will not while the others grow.
    """
    running = problem.running
    return (
        len(decision.slots) == len(running)
        and bool((running.num_remaining_tokens == 1).all())
        and bool((decision.tiers == running.tiers).all())
    )
