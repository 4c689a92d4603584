"""Chunked prefill: the rule of Sarathi-Serve (OSDI 2024) and of vLLM V1.

Every iteration has a token budget, so that a long prompt never holds up the requests that decode.
It goes, in this order, to

1. every running decode, one token each;
2. prompts under way, earliest arrival first;
3. waiting requests in arrival order, up to the first that does not fit,

each prompt getting the smaller of what it has left and what is left of the budget. Caches are KV
only. When memory is too short for what is running, the latest arrivals lose theirs, nobody new
starts in that iteration, and they come back by recomputation.

Choices that the sources leave open:

* A prompt starts when the memory for all of it is free, not for its first chunk alone, less what
  the prompts under way still need. 1 % of the pool stays free while requests run.
* As many requests hold memory as a batch may have, so that all of them can decode.

Priorities and tenants are ignored. No later arrival overtakes a waiting request, and the earliest
running one is never preempted, so everybody waits at most for those who came before; their number
is not bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aptserve_scheduler.arrays import Ints, indices
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    BatchProblem,
    Decision,
    Horizon,
    Policy,
    decodes_all_running,
)
from aptserve_scheduler.policies.common import make_room_for_oldest
from aptserve_scheduler.policies.fcfs import WATERMARK


@dataclass(frozen=True, slots=True)
class ChunkedConfig:
    """Settings of the policy; ValueError names a field out of range."""

    token_budget: int = 512
    """Most tokens of an iteration; a worker's own limit may be lower."""

    def __post_init__(self) -> None:
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, not {self.token_budget}")


class ChunkedPolicy(Policy):
    """Decodes first, then chunks of prompts in arrival order; KV tier only."""

    name = "chunked"

    def __init__(self, config: ChunkedConfig | None = None) -> None:
        self.config = config or ChunkedConfig()

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """Fill the token budget."""
        in_arrival_order = np.arange(min(len(problem.waiting), problem.max_num_seqs))
        return chunked_batch(problem, in_arrival_order, self.config.token_budget)

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when all running decode: who waits does not fit, and what is free shrinks."""
        return Horizon() if decodes_all_running(problem, decision) else THIS_ITERATION


def chunked_batch(problem: BatchProblem, candidates: Ints, token_budget: int) -> Decision | None:
    """A batch by the rule above, with waiting requests in an order of the caller's.

    ``candidates``: rows of ``problem.waiting`` in the order in which they may start.
    """
    budget = min(token_budget, problem.max_num_batched_tokens)
    problem = replace(problem, max_num_batched_tokens=budget)
    running, waiting = problem.running, problem.waiting
    going = _go_on(problem)
    starting, chunks = candidates[:0], candidates[:0]
    if not len(going.dropped):
        starting, chunks = _start(problem, candidates, going)
    if not len(going.rows) + len(starting):
        return make_room_for_oldest(problem)
    num_decodes = int(np.count_nonzero(running.num_remaining_tokens[going.rows] == 1))
    num_tokens = np.concatenate([going.num_tokens, chunks])
    return Decision(
        slots=np.concatenate([running.slots[going.rows], waiting.slots[starting]]),
        num_tokens=num_tokens,
        tiers=np.full(len(num_tokens), Tier.KV, np.int8),
        preempted=running.slots[going.dropped],
        reason=(
            f"{int(num_tokens.sum())} of {budget} tokens: {num_decodes} of {len(running)} running "
            f"requests decode, {len(going.rows) - num_decodes} prompts go on, "
            f"{len(starting)} of {len(waiting)} waiting ones start, "
            f"{len(going.dropped)} latest arrivals lose their memory"
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Going:
    """The part of running requests in a batch."""

    rows: Ints
    """Rows of ``running``: decodes, then prompts under way."""
    num_tokens: Ints
    dropped: Ints
    """Rows of ``running`` that lose their memory."""
    num_units_left: int
    """Free units after this batch, less what prompts under way still need."""


def _go_on(problem: BatchProblem) -> _Going:
    running = problem.running
    remaining = running.num_remaining_tokens
    is_decode = running.schedulable & (remaining == 1)
    in_order = np.concatenate([indices(is_decode), indices(running.schedulable & ~is_decode)])
    in_order = in_order[: problem.max_num_seqs]
    num_tokens = np.zeros(len(running), np.int64)
    num_tokens[in_order] = shares(remaining[in_order], problem.max_num_batched_tokens)
    after = problem.num_units_for(running.num_computed_tokens + num_tokens, running.tiers)
    # Requests whose end is in flight keep their memory until the result frees it.
    ending = ~running.schedulable
    room = problem.num_units - int(running.num_units[ending].sum())
    after[ending] = 0
    num_kept = int(np.searchsorted(np.cumsum(after), room, side="right"))
    rows = in_order[(num_tokens[in_order] > 0) & (in_order < num_kept)]
    whole = problem.num_units_for(running.num_tokens, running.tiers)
    whole[ending] = 0
    return _Going(
        rows=rows,
        num_tokens=num_tokens[rows],
        dropped=num_kept + indices(running.schedulable[num_kept:]),
        num_units_left=room - int(whole[:num_kept].sum()),
    )


def _start(problem: BatchProblem, candidates: Ints, going: _Going) -> tuple[Ints, Ints]:
    """Rows of ``waiting`` that start, and the length of each one's first chunk."""
    waiting = problem.waiting
    rows = candidates[: max(0, problem.max_num_seqs - len(problem.running))]
    watermark = int(WATERMARK * problem.num_units) if len(problem.running) else 0
    units = problem.num_blocks(waiting.num_tokens[rows]) * problem.tiers[0].units_per_block
    left = problem.max_num_batched_tokens - int(going.num_tokens.sum())
    chunks = shares(waiting.num_tokens[rows], left)
    fits = (chunks > 0) & (np.cumsum(units) <= going.num_units_left - watermark)
    num_new = len(rows) if fits.all() else int(np.argmin(fits))
    return rows[:num_new], chunks[:num_new]


def shares(wanted: Ints, budget: int) -> Ints:
    """What each gets of a budget when they are served in turn, each as far as it reaches."""
    before = wanted.cumsum() - wanted
    got: Ints = np.minimum(np.maximum(budget - before, 0), wanted)
    return got
