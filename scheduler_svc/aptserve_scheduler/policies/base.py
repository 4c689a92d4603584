"""What a policy sees and what it answers.

A policy is a pure function of a :class:`BatchProblem`: no clock, no memory of its own, no I/O, so
that equal problems give equal plans, live and simulated. Imports of the core are for types only:
the core imports this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from aptserve_scheduler.core.types import CostCoefficients, TierSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Tiers = npt.NDArray[np.int8]


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
    missed: Bools
    """The request would not meet its objectives if its wait ended now."""
    ttft_seconds: Floats
    """Objective for the time to first token."""
    tbt_seconds: Floats
    """Objective for the P99 of the times between tokens."""

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_remaining_tokens(self) -> Ints:
        """Tokens to compute until the next one is sampled; at least 1."""
        return self.num_tokens - self.num_computed_tokens


@dataclass(frozen=True, slots=True, eq=False)
class BatchProblem:
    """One worker's next iteration: who could run, and within which limits."""

    now: float
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


class Policy(Protocol):
    """A rule that composes batches."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """Those of a worker's tiers that the policy chooses from, at least KV."""
        ...

    def decide(self, problem: BatchProblem) -> Decision | None:
        """Compose a batch; ``None`` when nothing can run before a result comes back."""
        ...
