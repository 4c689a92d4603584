"""First come, first served, prefill first: the rule of vLLM 0.5.

While requests wait and fit, an iteration prefills them in arrival order; otherwise it decodes all
running ones. Caches are KV only. Memory too short for a decode costs the latest arrival its
memory; it comes back by recomputation.

Two rules go beyond that engine so that every accepted request is served. The watermark protects
running requests from running out of memory at once, so it is waived when there are none. A prompt
longer than the token budget starts when it is at the head and has the whole budget, provided the
memory for all of it is free; it then proceeds by budget-sized chunks, ahead of new prompts.
"""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import indices
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    BatchProblem,
    Decision,
    Horizon,
    Policy,
    decodes_all_running,
)
from aptserve_scheduler.policies.common import continue_prefills, make_room_for_oldest

WATERMARK = 0.01
"""Share of the pool that admissions leave free while requests run."""


class FcfsPolicy(Policy):
    """Prefill-first in arrival order, KV tier only."""

    name = "fcfs"

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """Prefill if anything can be, else decode, else make room."""
        return _prefill(problem) or _decode(problem) or make_room_for_oldest(problem)

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when all running decode: who waits does not fit, and what is free shrinks."""
        return Horizon() if decodes_all_running(problem, decision) else THIS_ITERATION


def _prefill(problem: BatchProblem) -> Decision | None:
    waiting, running = problem.waiting, problem.running
    going_on = continue_prefills(problem)
    kv = problem.tiers[0]
    seats = min(len(waiting), max(0, problem.max_num_seqs - len(running)))
    head = slice(0, seats)
    num_tokens = np.minimum(waiting.num_tokens[head], problem.max_num_batched_tokens)
    units = problem.num_blocks(waiting.num_tokens[head]) * kv.units_per_block
    watermark = int(WATERMARK * problem.num_units) if len(running) else 0
    fits = (np.cumsum(num_tokens) <= going_on.num_tokens_left) & (
        np.cumsum(units) <= going_on.num_units_left - watermark
    )
    num_new = int(np.argmin(fits)) if not fits.all() else seats
    if num_new + len(going_on.rows) == 0:
        return None
    new_tokens = num_tokens[:num_new]
    return Decision(
        slots=np.concatenate([running.slots[going_on.rows], waiting.slots[:num_new]]),
        num_tokens=np.concatenate([going_on.num_tokens, new_tokens]),
        tiers=np.full(len(going_on.rows) + num_new, Tier.KV, np.int8),
        reason=(
            f"prefill: first {num_new} of {len(waiting)} waiting requests "
            f"and {len(going_on.rows)} prompts under way, "
            f"{int(new_tokens.sum() + going_on.num_tokens.sum())} tokens, "
            f"{problem.num_free_units} of {problem.num_units} units were free"
        ),
    )


def _decode(problem: BatchProblem) -> Decision | None:
    running = problem.running
    seats = min(problem.max_num_seqs, problem.max_num_batched_tokens)
    ready = running.schedulable & (running.num_remaining_tokens == 1)
    ready &= np.cumsum(ready) <= seats
    after = problem.num_units_for(running.num_computed_tokens + ready, running.tiers)
    # Requests whose end is in flight keep their memory until the result frees it.
    ending = ~running.schedulable
    room = problem.num_units - int(running.num_units[ending].sum())
    after[ending] = 0
    num_kept = int(np.searchsorted(np.cumsum(after), room, side="right"))
    kept = indices(ready[:num_kept])
    if not len(kept):
        return None
    dropped = num_kept + indices(running.schedulable[num_kept:])
    return Decision(
        slots=running.slots[kept],
        num_tokens=np.ones(len(kept), np.int64),
        tiers=running.tiers[kept],
        preempted=running.slots[dropped],
        reason=(
            f"decode: {len(kept)} of {len(running)} running requests, "
            f"{len(problem.waiting)} wait, {len(dropped)} latest arrivals lose their memory"
        ),
    )
