"""A batch of decodes and chunks of prompts as it fills up, within tokens, requests and time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Ints, any_of
from aptserve_scheduler.policies.base import BatchProblem
from aptserve_scheduler.policies.outlook import Outlook

_LEAST_CHUNK = 64
"""Tokens of a prompt's first chunk, unless the prompt is shorter or the batch has no more left."""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Who is in the batch: parallel arrays of the running, lists of those few who start."""

    running: Ints
    """Rows of ``problem.running``."""
    running_tokens: Ints
    started: list[int]
    """Rows of ``problem.waiting``."""
    started_tokens: list[int]
    started_tiers: list[int]


class MixedBatch:
    """What is in the batch and what it leaves; knows nothing of memory."""

    def __init__(self, problem: BatchProblem, outlook: Outlook, most_seconds: float) -> None:
        """``most_seconds``: time the iteration should take at most; all decodes are counted in."""
        self.seconds = outlook.step_seconds
        """Estimated time of the iteration."""
        self.started: list[int] = []
        """Rows of ``problem.waiting`` that begin."""
        self._problem, self._outlook = problem, outlook
        self._most_seconds = most_seconds
        self._num_tokens_left = problem.max_num_batched_tokens
        self._num_seats_left = problem.max_num_seqs
        self._decodes: list[Ints] = []
        self._prompts: list[int] = []
        self._prompt_chunks: list[int] = []
        self._first_chunks: list[int] = []
        self._first_tiers: list[int] = []
        self._due_seconds = math.inf
        """When the first of those who started and are live would become late."""

    @property
    def is_full(self) -> bool:
        """Whether the batch has no token or no place left."""
        return self._num_tokens_left < 1 or self._num_seats_left < 1

    @property
    def is_empty(self) -> bool:
        """Whether nobody is in."""
        return self._num_seats_left == self._problem.max_num_seqs

    def decode(self, rows: Ints) -> None:
        """A token for these running requests, longest without one first if not all get in."""
        most = min(self._num_tokens_left, self._num_seats_left)
        if len(rows) > most:
            pending = self._problem.running.pending_seconds[rows]
            rows = rows[np.argsort(-pending, kind="stable")[:most]]
        self._decodes.append(rows)
        self._num_tokens_left -= len(rows)
        self._num_seats_left -= len(rows)

    def go_on(self, row: int, *, must: bool = False) -> None:
        """The next chunk of a running request's prompt, as long as there is time for.

        ``must``: :data:`_LEAST_CHUNK` even if there is no time.
        """
        chunk = self._chunk(int(self._outlook.remaining[row]), must=must)
        if chunk:
            self._prompts.append(row)
            self._prompt_chunks.append(chunk)

    def has_place_for(self, row: int) -> bool:
        """Whether this waiting request can start, and nobody who did becomes late by it.

        The first to start needs no time to be left.
        """
        if self.is_full:
            return False
        if not self.started:
            return True
        if self.seconds + float(self._outlook.waiting_prefill[row]) > self._due_seconds:
            return False
        num_tokens = int(self._problem.waiting.num_tokens[row])
        return self._affordable() >= min(num_tokens, _LEAST_CHUNK)

    def start(self, row: int) -> None:
        """Begin a waiting request with as much as there is time for, at least its first chunk.

        The batch must not be full.
        """
        outlook = self._outlook
        if not outlook.waiting_is_late[row]:
            self._due_seconds = min(self._due_seconds, float(outlook.waiting_slack[row]))
        self.started.append(row)
        num_tokens = int(self._problem.waiting.num_tokens[row])
        self._first_chunks.append(self._chunk(num_tokens, must=True))
        self._first_tiers.append(int(outlook.first_tiers[row]))

    def chosen(self, gives_way: Bools) -> Chosen | None:
        """The batch without those who gave way since they were put down; ``None``: it is empty."""
        rows = np.concatenate([*self._decodes, np.array(self._prompts, np.int64)])
        num_tokens = np.ones(len(rows), np.int64)
        if self._prompts:
            num_tokens[-len(self._prompts) :] = self._prompt_chunks
        if any_of(gives_way):
            stays = ~gives_way[rows]
            rows, num_tokens = rows[stays], num_tokens[stays]
        if not len(rows) and not self.started:
            return None
        return Chosen(
            running=rows,
            running_tokens=num_tokens,
            started=self.started,
            started_tokens=self._first_chunks,
            started_tiers=self._first_tiers,
        )

    def _affordable(self) -> int:
        """Prompt tokens that there is still time for."""
        per_token = max(self._problem.cost.seconds_per_token, 1e-9)
        return max(0, int((self._most_seconds - self.seconds) / per_token))

    def _chunk(self, num_remaining: int, *, must: bool) -> int:
        """Tokens of a prompt's next chunk, taken from what is left; 0: no place."""
        if self._num_seats_left < 1:
            return 0
        affordable = self._affordable()
        if must:
            affordable = max(affordable, _LEAST_CHUNK)
        chunk = min(num_remaining, self._num_tokens_left, affordable)
        if chunk:
            self._num_seats_left -= 1
            self._num_tokens_left -= chunk
            self.seconds += chunk * self._problem.cost.seconds_per_token
        return chunk
