"""Steps that several policies share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Ints, indices
from aptserve_scheduler.policies.base import BatchProblem, Decision


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """The next chunks of prompts that are longer than a batch, with what they leave."""

    rows: Ints
    """Rows of ``problem.running``."""
    num_tokens: Ints
    num_tokens_left: int
    """Token budget after them."""
    num_units_left: int
    """Free units after them, less what the rest of their prompts will need."""


def continue_prefills(problem: BatchProblem) -> Continuation:
    """Go on with prompts under way, earliest arrival first, each as far as the budget reaches.

    A prompt longer than the token budget is computed in chunks of the budget over several
    iterations. Until it is through, nobody else is promised the units that it still needs.
    """
    running = problem.running
    remaining = running.num_remaining_tokens
    rows: list[int] = []
    chunks: list[int] = []
    budget, free, promised = problem.max_num_batched_tokens, problem.num_free_units, 0
    under_way = indices(running.schedulable & (remaining > 1))
    if not len(under_way):
        return Continuation(under_way, under_way, budget, max(0, free))
    reach = problem.num_units_for(running.num_tokens[under_way], running.tiers[under_way])
    for row, whole in zip(under_way.tolist(), reach.tolist(), strict=True):
        chunk = min(int(remaining[row]), budget)
        end = running.num_computed_tokens[row : row + 1] + chunk
        after = int(problem.num_units_for(end, running.tiers[row : row + 1])[0])
        more = after - int(running.num_units[row])
        promised += whole - int(running.num_units[row])
        if chunk and more <= free and len(rows) < problem.max_num_seqs:
            rows.append(row)
            chunks.append(chunk)
            budget, free, promised = budget - chunk, free - more, promised - more
    return Continuation(
        rows=np.array(rows, np.int64),
        num_tokens=np.array(chunks, np.int64),
        num_tokens_left=budget,
        num_units_left=max(0, free - promised),
    )


def make_room_for_oldest(problem: BatchProblem) -> Decision | None:
    """Run the earliest running request alone; the latest arrivals give way until it fits.

    The last resort when memory is so short that nothing fits as things stand. ``None`` when the
    memory is held by requests whose end is in flight: their result will free it.
    """
    running = problem.running
    rows = indices(running.schedulable)
    if not len(rows):
        return None
    first, others = rows[:1], rows[:0:-1]
    chunk = np.minimum(running.num_remaining_tokens[first], problem.max_num_batched_tokens)
    after = problem.num_units_for(running.num_computed_tokens[first] + chunk, running.tiers[first])
    missing = int((after - running.num_units[first])[0]) - problem.num_free_units
    freed = np.concatenate([[0], np.cumsum(running.num_units[others])])
    num_preempted = int(np.searchsorted(freed, missing))
    if num_preempted == len(freed):
        return None
    return Decision(
        slots=running.slots[first],
        num_tokens=chunk,
        tiers=running.tiers[first],
        preempted=running.slots[others[:num_preempted]],
        reason=(
            f"memory is short: the earliest of {len(rows)} running requests goes on, "
            f"{num_preempted} later ones give way"
        ),
    )
