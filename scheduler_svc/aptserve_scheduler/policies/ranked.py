"""Batches by rank with preemption, for policies that order requests by levels.

The lowest level goes first, by arrival within a level. Caches are KV only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, indices
from aptserve_scheduler.core.types import Tier
from aptserve_scheduler.policies.base import BatchProblem, Candidates, Decision
from aptserve_scheduler.policies.chunked import shares
from aptserve_scheduler.policies.common import make_room_for_oldest
from aptserve_scheduler.policies.fcfs import WATERMARK

_KV = int(Tier.KV)
_MOST_PASSES = 8
"""Times that the memory is shared out anew after somebody did not fit; then the rest loses it."""


class Everyone(Candidates):
    """Running, then waiting requests; a column is joined when it is read for the first time.

    What is computed for all of them at once takes half as long as for either kind in turn.
    """

    def __init__(self, problem: BatchProblem) -> None:
        object.__setattr__(self, "_kinds", (problem.running, problem.waiting))

    def __getattr__(self, name: str) -> Any:  # a field of Candidates that is not filled in yet
        column = np.concatenate([getattr(kind, name) for kind in self._kinds])
        object.__setattr__(self, name, column)
        return column


def ranked_batch(problem: BatchProblem, everyone: Everyone, levels: Ints) -> Decision | None:
    """A batch by rank with preemption: the lowest of ``levels`` first, by arrival within a level.

    Tokens, seats and memory go to running and waiting requests alike in that order. A waiting
    request that cannot have the memory for all its tokens even from those ranked below lets no
    other one in before it; running ones go on in what is left. Whose memory is needed loses it,
    the last in rank first; whoever gets no tokens keeps it otherwise. Caches are KV only.
    """
    running, waiting = problem.running, problem.waiting
    room = _Room.of(problem)
    line = _line_up(problem, everyone, levels, room)
    is_running = line < len(running)
    computed, slots = everyone.num_computed_tokens[line], everyone.slots[line]
    num_remaining = everyone.num_tokens[line] - computed
    chunks = shares(num_remaining, problem.max_num_batched_tokens)
    chunks[(chunks > 0).cumsum() > problem.max_num_seqs] = 0
    units = problem.num_blocks(computed + chunks) * problem.tiers[0].units_per_block
    kept = _kept(units, is_running | (chunks > 0), room)
    chosen, preempted = kept & (chunks > 0), is_running & ~kept
    num_chosen = int(np.count_nonzero(chosen))
    if not num_chosen:
        return make_room_for_oldest(problem)
    num_new = int(np.count_nonzero(chosen & ~is_running))
    return Decision(
        slots=slots[chosen],
        num_tokens=chunks[chosen],
        tiers=np.full(num_chosen, _KV, np.int8),
        preempted=slots[preempted],
        reason=(
            f"by rank: {num_chosen - num_new} of {len(running)} running requests and {num_new} "
            f"of {len(waiting)} waiting ones get {int(chunks[chosen].sum())} tokens, "
            f"{int(np.count_nonzero(preempted))} of the lowest ranks lose their memory"
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class FirstInLine:
    """The waiting request of the best rank: while it does not fit, no other one comes in.

    All running requests decode: their caches only grow, so it goes without until enough of those
    before it in rank fall behind it, or it moves up, or another one comes first. Equal ages count
    as equal arrivals, of which the running request goes first.
    """

    problem: BatchProblem
    waiting_levels: Ints
    row: int
    """Of ``problem.waiting``."""

    @classmethod
    def of(cls, problem: BatchProblem, waiting_levels: Ints) -> FirstInLine:
        """At least one request waits; they are in arrival order."""
        return cls(problem, waiting_levels, int(waiting_levels.argmin()))

    def levels_behind(self) -> Ints:
        """[n] lowest level in which each running request ranks behind it."""
        problem = self.problem
        is_older = problem.running.age_seconds >= problem.waiting.age_seconds[self.row]
        levels: Ints = self.waiting_levels[self.row] + is_older
        return levels

    def overtakers(self, next_levels: Ints) -> Ints:
        """Rows of those waiting who would come first on the way to lower levels, itself included.

        ``next_levels`` [n]: the level that each goes to next, its present one if to no other.
        """
        level = self.waiting_levels[self.row]
        comes_first = next_levels < level
        older = slice(0, self.row)
        comes_first[older] |= next_levels[older] == level
        return indices(comes_first)

    def fits_at(self, falls_behind: Floats) -> float:
        """When it might have memory and a seat, those behind it losing theirs.

        ``falls_behind`` [n]: when each running request is behind it, in any unit, infinite if
        never. The answer is one of these moments.
        """
        problem, running = self.problem, self.problem.running
        room = _Room.of(problem)
        units_per_block = problem.tiers[0].units_per_block
        units = problem.num_blocks(running.num_tokens) * units_per_block
        needed = int(problem.num_blocks(problem.waiting.num_tokens[self.row])) * units_per_block
        missing = needed + int(units.sum()) - (room.num_units - room.headroom)
        # Behind all of them it got nothing, be it for tokens: at least one must be behind it.
        order = falls_behind.argsort()
        num_behind = 1 + int(units[order].cumsum().searchsorted(missing))
        num_behind = max(num_behind, 1 + len(running) - room.num_seats)
        if num_behind > len(running):
            return math.inf
        return float(falls_behind[order[num_behind - 1]])


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


def _line_up(problem: BatchProblem, everyone: Everyone, levels: Ints, room: _Room) -> Ints:
    """Rows of running, then waiting, requests in rank order.

    From the first on for which there can be no room, only running ones.
    """
    order = np.lexsort((-everyone.age_seconds, levels))
    order = order[everyone.schedulable[order]]
    in_line: Bools = order < len(problem.running)
    units = problem.num_blocks(everyone.num_tokens[order]) * problem.tiers[0].units_per_block
    fits = units.cumsum() <= room.num_units - room.headroom * ~in_line
    fits[room.num_seats :] = False
    num_fitting = len(order) if fits.all() else int(fits.argmin())
    in_line[:num_fitting] = True
    line: Ints = order[in_line]
    return line


def _kept(units: Ints, takes_seat: Bools, room: _Room) -> Bools:
    """Who holds the memory he is to hold; those in front first, the others as they fit."""
    kept: Bools = takes_seat.cumsum() <= room.num_seats
    for _ in range(_MOST_PASSES):
        used = (units * kept).cumsum()
        first = int(used.searchsorted(room.num_units, side="right"))
        if first == len(used):
            return kept
        left = room.num_units - int(used[first] - units[first])
        kept[first:] &= units[first:] <= left
    return kept & ((units * kept).cumsum() <= room.num_units)
