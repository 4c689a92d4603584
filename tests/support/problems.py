"""Builders for a policy's view of one iteration, without a scheduler behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from aptserve_scheduler.core import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies import BatchProblem, Candidates

from support.scheduler import HIDDEN, KV, make_cost


@dataclass(frozen=True)
class Row:
    """One request; waiting ones have ``num_computed`` 0."""

    num_computed: int
    num_tokens: int
    tier: Tier = Tier.KV
    schedulable: bool = True
    max_num_tokens: int = 29
    pending_seconds: float = 1.0
    miss_after_seconds: float = 10.0
    ttft_seconds: float = 10.0
    tbt_seconds: float = 10.0
    age_seconds: float = 1.0
    num_output_tokens: int = 0
    priority: int = 0
    expected_output_tokens: int = 0


@dataclass(frozen=True)
class ProblemBuilder:
    """A worker of 58 units (29 tokens in KV) whose batches hold 8 tokens; running slots from 0."""

    num_units: int = 58
    block_size: int = 1
    tiers: tuple[TierSpec, ...] = (KV, HIDDEN)
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 8
    cost: CostCoefficients = field(default_factory=make_cost)
    now: float = 1.0

    def build(self, running: list[Row], waiting: list[Row] | None = None) -> BatchProblem:
        """The problem; waiting slots follow those of the running."""
        candidates = self._candidates(0, running)
        return BatchProblem(
            now=self.now,
            worker=0,
            num_units=self.num_units,
            num_free_units=self.num_units - int(candidates.num_units.sum()),
            block_size=self.block_size,
            tiers=self.tiers,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            cost=self.cost,
            waiting=self._candidates(len(running), waiting or []),
            running=candidates,
        )

    def _candidates(self, first_slot: int, rows: list[Row]) -> Candidates:
        def ints(values: list[int]) -> np.ndarray:
            return np.array(values, np.int64)

        def floats(values: list[float]) -> np.ndarray:
            return np.array(values, np.float64)

        per_block = {tier.tier: tier.units_per_block for tier in self.tiers}
        pending = floats([row.pending_seconds for row in rows])
        miss_after = floats([row.miss_after_seconds for row in rows])
        return Candidates(
            slots=np.arange(first_slot, first_slot + len(rows)),
            pending_seconds=pending,
            num_tokens=ints([row.num_tokens for row in rows]),
            num_computed_tokens=ints([row.num_computed for row in rows]),
            max_num_tokens=ints([row.max_num_tokens for row in rows]),
            num_units=ints(
                [-(-row.num_computed // self.block_size) * per_block[row.tier] for row in rows]
            ),
            tiers=np.array([row.tier if row.num_computed else 0 for row in rows], np.int8),
            schedulable=np.array([row.schedulable for row in rows], np.bool_),
            miss_after_seconds=miss_after,
            missed=pending > miss_after,
            ttft_seconds=floats([row.ttft_seconds for row in rows]),
            tbt_seconds=floats([row.tbt_seconds for row in rows]),
            age_seconds=floats([row.age_seconds for row in rows]),
            num_prompt_tokens=ints([row.num_tokens - row.num_output_tokens for row in rows]),
            num_output_tokens=ints([row.num_output_tokens for row in rows]),
            priorities=ints([row.priority for row in rows]),
            expected_output_tokens=ints([row.expected_output_tokens for row in rows]),
        )


def make_problem(
    running: list[Row], waiting: list[Row] | None = None, **changes: object
) -> BatchProblem:
    """A small problem; fields of the builder may be replaced."""
    return ProblemBuilder(**changes).build(running, waiting)  # type: ignore[arg-type]
