"""Classes of requests, how fast each arrives, and the batch sizes that keep pace with them.

A class is a size of the prompt (lengths whose binary digits are as many, in pairs) and a size of
the output, or none where nobody knows it. The rate of a class is the sum of ``exp(-age / window)``
over its arrivals, divided by the window; its lengths are running means.

In equilibrium (the fluid limit of arXiv 2504.11320) an iteration takes the time T in which as much
work arrives as it does:

    T = base seconds + T * sum over classes of rate * seconds of one request over its life

    seconds of a request = prefill of l tokens + o decodes on l + o / 2 cached tokens each

l: prompt tokens, o: output tokens. With more than a full load there is no such T. Nor may more be
resident than memory and rows last for: a request stays for o + 1 iterations of T with l + o / 2
tokens, so T is at most

    tokens in the pool / sum of rate * (o + 1) * (l + o / 2)    and    rows / sum of rate * (o + 1).

``rate * T`` requests of the class then join each iteration: its threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints
from aptserve_scheduler.core.types import Tier
from aptserve_scheduler.policies.base import BatchProblem
from aptserve_scheduler.policies.slack import prompt_seconds

NUM_SIZES = 32
"""Sizes of an int64, from 0."""
UNKNOWN = 0
"""Size of outputs of which nothing is known; a known one has at least a token."""
_LEAST_SECONDS = 1e-9


def class_of(num_prompt: Ints, num_output: Ints) -> Ints:
    """[n] class by prompt tokens and output tokens, 0 for unknown."""
    return _size_of(num_prompt) * NUM_SIZES + _size_of(num_output)


def is_unknown(classes: Ints) -> Bools:
    """[n] whether nothing is known of the output."""
    unknown: Bools = classes % NUM_SIZES == UNKNOWN
    return unknown


def _size_of(num_tokens: Ints) -> Ints:
    return (np.frexp(num_tokens)[1].astype(np.int64) + 1) // 2


@dataclass(slots=True)
class _Mean:
    """Running mean that forgets: after ``window`` values each new one counts 1 / window."""

    value: float
    window: int
    num: int = 0

    def add(self, value: float) -> None:
        self.num = min(self.num + 1, self.window)
        self.value += (value - self.value) / self.num


class Flow:
    """What arrives, learned as it does."""

    def __init__(self, window_seconds: float, window_answers: int, boundaries: Ints) -> None:
        """``boundaries``: output lengths at which answers of unknown length are counted."""
        self._window = window_seconds
        self._boundaries = boundaries
        self._mass = np.zeros(NUM_SIZES**2)
        """Decayed number of arrivals, as of ``_counted_at``."""
        self._counted_at = 0.0
        self._num_prompt = np.zeros(NUM_SIZES**2)
        self._num_output = np.zeros(NUM_SIZES**2)
        """Mean lengths of each class."""
        self._num_arrived = np.zeros(NUM_SIZES**2)
        self._answer = _Mean(0.0, window_answers)
        self._reaches = [_Mean(1.0, window_answers) for _ in boundaries]

    def arrived(self, kind: int, num_prompt: int, num_output: int, now: float) -> None:
        """A request of this class arrived; ``num_output`` is 0 if unknown."""
        self._mass = self._mass_at(now)
        self._counted_at = now
        self._mass[kind] += 1.0
        self._num_arrived[kind] += 1.0
        share = 1.0 / self._num_arrived[kind]
        self._num_prompt[kind] += share * (num_prompt - self._num_prompt[kind])
        self._num_output[kind] += share * (num_output - self._num_output[kind])

    def completed(self, num_output: int) -> None:
        """An answer of unknown length turned out so long."""
        self._answer.add(num_output)
        for reaches, boundary in zip(self._reaches, self._boundaries.tolist(), strict=True):
            reaches.add(float(num_output > boundary))

    def thresholds(self, problem: BatchProblem) -> tuple[Floats, Floats]:
        """Requests that join each iteration in equilibrium: by class; of unknown length at each
        boundary. Neither ever rises while nobody arrives and no answer completes."""
        rates = self._mass_at(problem.now) / self._window
        joining = rates * self._iteration_seconds(problem, rates)
        unknown = joining.reshape(NUM_SIZES, NUM_SIZES)[:, UNKNOWN].sum()
        return joining, unknown * np.array([reaches.value for reaches in self._reaches])

    def _mass_at(self, now: float) -> Floats:
        mass: Floats = self._mass * np.exp(-max(now - self._counted_at, 0.0) / self._window)
        return mass

    def _iteration_seconds(self, problem: BatchProblem, rates: Floats) -> float:
        present = rates.nonzero()[0]
        rate, num_prompt = rates[present], self._num_prompt[present]
        num_output = np.where(is_unknown(present), self._answer.value, self._num_output[present])
        cost, mean_cached = problem.cost, num_prompt + num_output / 2
        per_cached = cost.seconds_per_cached_token.get(Tier.KV, 0.0)
        decode = cost.seconds_per_token + cost.seconds_per_sequence + per_cached * mean_cached
        prefill = prompt_seconds(cost, np.zeros(1, np.int64), num_prompt)
        load = float(rate @ (prefill + num_output * decode))
        base = max(cost.base_seconds, _LEAST_SECONDS)
        seconds = base / (1 - load) if load < 1 else np.inf
        num_tokens = problem.num_units // problem.tiers[0].units_per_block * problem.block_size
        num_residents = rate @ (num_output + 1)
        num_cached = rate @ ((num_output + 1) * mean_cached)
        if not num_residents:
            return base
        rows = problem.max_num_seqs / num_residents
        return float(min(seconds, rows, num_tokens / num_cached))
