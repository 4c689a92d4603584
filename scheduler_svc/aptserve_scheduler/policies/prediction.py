"""How long answers will be, learned from the service's own history.

A request that has produced x tokens is expected to produce as many more as the completed answers
longer than x did on average, the mean residual life. Two sources of that average are blended:

    all answers         r(x)   = (S(x) + L(x)) / (k(x) + 1),             L(x) = max(x, mean length)
    prompts of its size r_b(x) = (S_b(x) + m r(x)) / (k_b(x) + m),       m = ``pooling``

k: remembered answers longer than x; S: the tokens by which they exceed x; b: prompts whose lengths
have the same number of binary digits. L is one answer made up so that no divisor is zero: a request
that outlived everything remembered is expected to last as long again as it has.

Answers that were aborted or failed teach nothing, as they do not tell where they would have ended.
The first answers to complete are the short ones, so a young history expects too little.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.policies.base import Arrival

_Scalar = TypeVar("_Scalar", bound=np.generic)

_EVERYONE = 0
"""The group of all answers; no prompt is so short that it has no binary digit."""


def reaching(column: npt.NDArray[_Scalar], slot: int) -> npt.NDArray[_Scalar]:
    """A column of what a policy remembers per slot, lengthened by zeros until it has the slot."""
    if slot < len(column):
        return column
    added = max(2 * len(column), slot + 1) - len(column)
    return np.concatenate([column, np.zeros(added, column.dtype)])


class OutputPredictor:
    """Expected remaining output tokens; see the head of this file.

    ``window`` answers are remembered, the latest to complete; ``pooling`` is how many answers of
    its own a class of prompts needs to count as much as all answers together.
    """

    def __init__(self, window: int = 4096, pooling: float = 8.0) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        if pooling <= 0:
            raise ValueError(f"pooling must be positive, not {pooling}")
        self._window = window
        self._pooling = pooling
        self._num_prompt = np.zeros(0, np.int64)
        self._groups = np.zeros(window, np.int64)
        self._lengths = np.zeros(window, np.int64)
        self._num_ended = 0
        self._excess = _Excess()

    @property
    def num_answers(self) -> int:
        """Answers remembered."""
        return min(self._num_ended, self._window)

    def arrived(self, arrival: Arrival) -> None:
        """As of :class:`Policy`."""
        self._num_prompt = reaching(self._num_prompt, arrival.slot)
        self._num_prompt[arrival.slot] = arrival.num_prompt_tokens

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        """As of :class:`Policy`."""
        if not completed or num_output_tokens < 1:
            return
        place = self._num_ended % self._window
        if self._num_ended >= self._window:
            self._excess.forget(int(self._groups[place]), int(self._lengths[place]))
        group = int(_group_of(self._num_prompt[slot : slot + 1])[0])
        self._groups[place], self._lengths[place] = group, num_output_tokens
        self._num_ended += 1
        self._excess.remember(group, num_output_tokens)

    def remaining(self, num_output: Ints, num_prompt: Ints, max_remaining: Ints) -> Floats:
        """[n] expected further output tokens, from 1 to ``max_remaining``.

        ``num_output`` [n]: tokens so far; ``num_prompt`` [n]. Without any history: the most.
        """
        most = np.maximum(max_remaining, 1).astype(np.float64)
        if not self._num_ended:
            return most
        everyone, alike = self._excess.beyond(_group_of(num_prompt), num_output)
        num, excess = everyone
        pooled = (excess + np.maximum(num_output, self._mean_length)) / (num + 1)
        num, excess = alike
        expected: Floats = (excess + self._pooling * pooled) / (num + self._pooling)
        return np.minimum(np.maximum(expected, 1.0), most)

    @property
    def _mean_length(self) -> float:
        return self._excess.num_tokens / self.num_answers


def _group_of(num_prompt: Ints) -> Ints:
    """Number of binary digits."""
    return np.frexp(num_prompt)[1].astype(np.int64)


class _Excess:
    """Of the lengths in each group, how many exceed a value and by how much in all.

    An answer is entered for every value below its length, so that asking is a look-up.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        """Sum of all lengths."""
        # The last group and the last value stand for all beyond them; nothing is entered there.
        # Floats hold these whole numbers exactly.
        self._figures = np.zeros((2, 2, 2))
        """[2, groups, values] number and excess."""

    def remember(self, group: int, length: int) -> None:
        """Enter an answer, for its group and for all."""
        _, num_groups, num_values = self._figures.shape
        more_groups = max(0, group + 2 - num_groups)
        more_values = max(num_values, length) if length >= num_values else 0
        if more_groups or more_values:
            self._figures = np.pad(self._figures, [(0, 0), (0, more_groups), (0, more_values)])
        self._add(1, group, length)

    def forget(self, group: int, length: int) -> None:
        """Take out an answer that was entered."""
        self._add(-1, group, length)

    def beyond(self, groups: Ints, values: Ints) -> tuple[Floats, Floats]:
        """[2, n], [2, n]: the lengths above a value and the sum of their excess over it, of all
        answers and of those of a group."""
        _, num_groups, num_values = self._figures.shape
        values = np.minimum(values, num_values - 1)
        places = np.minimum(groups, num_groups - 1) * num_values + values
        # Everyone's figures come first.
        figures = self._figures.reshape(2, -1)
        return figures.take(values, axis=1), figures.take(places, axis=1)

    def _add(self, num: int, group: int, length: int) -> None:
        excess = num * np.arange(length, 0, -1)
        for row in (_EVERYONE, group):
            self._figures[0, row, :length] += num
            self._figures[1, row, :length] += excess
        self.num_tokens += num * length
