"""A worker that exists only as numbers: what it advertises, and how long its iterations take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aptserve_scheduler.arrays import Ints, Tiers
from aptserve_scheduler.core import WorkerSpec

Amount = Any
"""A number or an array of floats; arithmetic on a plain number is far quicker than on an array."""


class StepCost(Protocol):
    """True time of a worker's iterations, of which the scheduler only sees an estimate."""

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: Tiers) -> float:
        """Seconds of one iteration.

        Arrays are [n], an entry per sequence: tokens cached before the iteration, tokens computed
        in it, and the number of the tier that holds its cache.
        """
        ...

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        """Seconds of an iteration, or of each of a series, that computes a token per sequence.

        Both have an entry per tier, in the order of the worker's: sequences, and cached tokens of
        all of them together, a number or [steps]. The result, of the same shape or one number for
        all, equals :meth:`seconds` of such a batch.
        """
        ...


@dataclass(frozen=True, slots=True)
class SimWorker:
    """One simulated worker. ``spec.cost`` is the estimate that it would advertise."""

    spec: WorkerSpec
    cost: StepCost
