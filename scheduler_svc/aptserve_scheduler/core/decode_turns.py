"""Decodes in which the running requests take turns, entered in the books at once.

See :mod:`core.decodes`.
Under pressure a policy may let some of the running sit out: who decodes then changes from one
iteration to the next, though nothing but time passes. A policy that knows its rule for that
(:attr:`~aptserve_scheduler.policies.base.Horizon.members`) need not decide anew each time. The
books are then as if each iteration had been planned and answered by itself.
"""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints, Tiers
from aptserve_scheduler.core.decode_run import enter_tokens
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.worker_state import WorkerState
from aptserve_scheduler.policies.base import Members, Policy, Service


class DecodeTurns:
    """Iterations that each compute one token for some of a worker's running requests.

    Arrays are [n], an entry per running request, and as after the iterations taken so far.
    """

    def __init__(self, state: State, worker: WorkerState, members: Members) -> None:
        table, self.slots = state.table, worker.running.slots.copy()
        self.request_ids = table.ids(self.slots)
        self.tiers: Tiers = table.tier[self.slots]
        self.num_cached: Ints = table.num_computed[self.slots]
        """Cached tokens of each."""
        self.pending_since: Floats = table.pending_since[self.slots]
        """Time of the latest token of each."""
        self._members = members
        self._block_size = worker.spec.block_size
        self._units_per_block = worker.ledger.units_per_block(self.tiers)
        self._num_free_units = worker.ledger.num_free
        self.entries: list[Ints] = []
        """Of each iteration taken, who got a token; with the gaps to their tokens before."""
        self.gap_seconds: list[Floats] = []
        self.ends: list[float] = []

    def next(self, now: float) -> Ints | None:
        """Entries that decode in an iteration that starts now; ``None``: that is to be decided."""
        entries: Ints = self._members(now, self.num_cached, self.pending_since).nonzero()[0]
        if not len(entries):
            return None
        begins_block = self.num_cached[entries] % self._block_size == 0
        num_units = int(self._units_per_block[entries[begins_block]].sum())
        if num_units > self._num_free_units:
            return None
        self._num_free_units -= num_units
        return entries

    def take(self, entries: Ints, end: float) -> None:
        """The iteration of those that :meth:`next` named ends."""
        self.entries.append(entries)
        self.gap_seconds.append(end - self.pending_since[entries])
        self.ends.append(end)
        self.pending_since[entries] = end
        self.num_cached[entries] += 1


def enter_turns(
    state: State, worker: WorkerState, turns: DecodeTurns, now: float, policy: Policy
) -> None:
    """Enter the iterations taken, at least one, of turns that started now.

    The new tokens have the value 0. Requests that are to end with the last of them stay as they
    are until the caller ends them.
    """
    table, slots = state.table, turns.slots
    if not turns.ends:
        raise ValueError("no iteration was taken")
    if (turns.num_cached >= table.max_total[slots]).any():
        raise ValueError("a request got more than its max_tokens")
    entries, gaps = np.concatenate(turns.entries), np.concatenate(turns.gap_seconds)
    num_new = np.bincount(entries, minlength=len(slots))
    slow = entries[gaps > table.tbt_objective[slots[entries]]]
    table.num_gaps[slots] += num_new
    table.num_slow_gaps[slots] += np.bincount(slow, minlength=len(slots))
    table.judge(slots)
    table.pending_since[slots] = turns.pending_since
    _note_records(state, slots, num_new, gaps[entries.argsort(kind="stable")])
    enter_tokens(state, worker, slots, num_new, len(turns.ends), turns.ends[-1] - now)
    if policy.follows_service:
        _tell_of_service(policy, turns, now)


def _note_records(state: State, slots: Ints, num_new: Ints, gaps: Floats) -> None:
    """``gaps``: of the first of the requests all in order, then of the second."""
    seconds, place = gaps.tolist(), 0
    for request, num in zip(state.table.records(slots), num_new.tolist(), strict=True):
        request.gap_seconds += seconds[place : place + num]
        request.output_token_ids += [0] * num
        place += num


def _tell_of_service(policy: Policy, turns: DecodeTurns, now: float) -> None:
    start = now
    for entries, end in zip(turns.entries, turns.ends, strict=True):
        tokens = np.ones(len(entries), np.int64)
        policy.served(Service(turns.slots[entries], tokens, tokens, end - start, end))
        start = end
