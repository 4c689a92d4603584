"""A worker that exists only as numbers: what it advertises, and how long its iterations take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aptserve_scheduler.core import WorkerSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Tiers = npt.NDArray[np.int8]


class StepCost(Protocol):
    """True time of a worker's iterations, of which the scheduler only sees an estimate."""

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: Tiers) -> float:
        """Seconds of one iteration.

        Arrays are [n], an entry per sequence: tokens cached before the iteration, tokens computed
        in it, and the number of the tier that holds its cache.
        """
        ...

    def decode_seconds(self, num_sequences: Ints, num_cached: Ints) -> Floats:
        """Seconds of a series of iterations that compute one token for each sequence.

        ``num_sequences`` [k]: sequences per tier, in the order of the worker's tiers;
        ``num_cached`` [steps, k]: cached tokens per tier and iteration, all sequences together.
        Returns [steps]; each equals :meth:`seconds` of such a batch.
        """
        ...


@dataclass(frozen=True, slots=True)
class SimWorker:
    """One simulated worker. ``spec.cost`` is the estimate that it would advertise."""

    spec: WorkerSpec
    cost: StepCost
