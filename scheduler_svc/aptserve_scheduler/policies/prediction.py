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

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from aptserve_scheduler.policies.base import Arrival, Floats, Ints

_Scalar = TypeVar("_Scalar", bound=np.generic)

_STRIDE = 1 << 40
"""More than any length, so that ``group * _STRIDE + length`` sorts by group, then by length."""
_NUM_GROUPS = 64
"""Binary digits of an int64, and none."""


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
        self._tables: tuple[_Excess, _Excess] | None = None

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
        self._groups[place] = _group_of(self._num_prompt[slot : slot + 1])[0]
        self._lengths[place] = num_output_tokens
        self._num_ended += 1
        self._tables = None

    def remaining(self, num_output: Ints, num_prompt: Ints, max_remaining: Ints) -> Floats:
        """[n] expected further output tokens, from 1 to ``max_remaining``.

        ``num_output`` [n]: tokens so far; ``num_prompt`` [n]. Without any history: the most.
        """
        most = np.maximum(max_remaining, 1).astype(np.float64)
        if not self._num_ended:
            return most
        everyone, by_group = self._tables or self._learn()
        num, excess = everyone.beyond(0, num_output)
        pooled = (excess + np.maximum(num_output, everyone.mean)) / (num + 1)
        num, excess = by_group.beyond(_group_of(num_prompt), num_output)
        expected = (excess + self._pooling * pooled) / (num + self._pooling)
        return np.minimum(np.maximum(expected, 1.0), most)

    def _learn(self) -> tuple[_Excess, _Excess]:
        known = slice(0, self.num_answers)
        groups, lengths = self._groups[known], self._lengths[known]
        tables = _Excess.of(np.zeros_like(groups), lengths), _Excess.of(groups, lengths)
        self._tables = tables
        return tables


def _group_of(num_prompt: Ints) -> Ints:
    """Number of binary digits."""
    return np.frexp(num_prompt)[1].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Excess:
    """Lengths in groups, ready to be asked how many exceed a value and by how much in all."""

    keys: Ints
    """Group and length in one number, ascending."""
    totals: Ints
    """Sum of the lengths before each key, and of all."""
    ends: Ints
    """[_NUM_GROUPS] Where the keys of each group end."""

    @classmethod
    def of(cls, groups: Ints, lengths: Ints) -> _Excess:
        keys = np.sort(groups * _STRIDE + lengths)
        return cls(
            keys=keys,
            totals=np.concatenate([[0], np.cumsum(keys % _STRIDE)]),
            ends=np.searchsorted(keys, np.arange(1, _NUM_GROUPS + 1) * _STRIDE),
        )

    @property
    def mean(self) -> float:
        return float(self.totals[-1] / len(self.keys))

    def beyond(self, groups: Ints | int, values: Ints) -> tuple[Ints, Ints]:
        """[n], [n]: of each group the lengths above a value; the sum of their excess over it."""
        start = self.keys.searchsorted(groups * _STRIDE + values, side="right")
        end = self.ends[groups]
        num = end - start
        return num, self.totals[end] - self.totals[start] - num * values
