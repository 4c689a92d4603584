"""Exact counts of memory units: what the scheduler has given out, and what a worker must report.

A request that holds t cached tokens in a tier holds ``ceil(t / block_size) * units_per_block``
units. The scheduler counts at the moment a plan is composed; the worker counts when it runs it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aptserve_scheduler.arrays import Ints, Tiers
from aptserve_scheduler.core.errors import IntegrityError
from aptserve_scheduler.core.types import Tier, WorkerSpec


class UnitLedger:
    """Units of one worker's pool as given out by composed plans."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.num_units = spec.num_units
        self.num_used = 0
        self._block_size = spec.block_size
        # Indexed by the tier's number; 0 for tiers that the worker does not have.
        self._units_per_block = np.zeros(max(Tier) + 1, np.int64)
        for tier in spec.tiers:
            self._units_per_block[tier.tier] = tier.units_per_block

    @property
    def num_free(self) -> int:
        """Units that nobody holds."""
        return self.num_units - self.num_used

    def units_per_block(self, tiers: Tiers) -> Ints:
        """Units of a block in each tier; 0 where the worker lacks the tier."""
        return self._units_per_block[tiers]

    def units_for(self, num_tokens: Ints, tiers: Tiers) -> Ints:
        """Units that caches of these lengths take in these tiers."""
        return -(-num_tokens // self._block_size) * self._units_per_block[tiers]

    def take(self, num_units: int) -> None:
        """Give out units; the caller has checked that they are free. Negative: they come back."""
        if not 0 <= self.num_used + num_units <= self.num_units:
            raise IntegrityError(
                f"{num_units} units cannot be taken: {self.num_used} of {self.num_units} are used"
            )
        self.num_used += num_units


class WorkerCount:
    """The count that a worker must arrive at, followed plan by plan as its results come in.

    It differs from :class:`UnitLedger` because the worker is behind: it still holds sequences whose
    release it has not seen, and it takes nothing for a sequence that ended before its plan ran.
    Plans and results are ordered, so the count after each is exact, with two exceptions where only
    bounds are known until the sequence is released: a sequence that failed (anything from nothing
    to what the plan gave it), and a promotion of a sequence that had ended.
    """

    def __init__(self) -> None:
        self._bounds: dict[int, tuple[int, int]] = {}
        self._low = 0
        self._high = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most units that the worker may have in use."""
        return self._low, self._high

    def of(self, sequence_id: int) -> tuple[int, int]:
        """Bounds of one sequence; nothing for one that the worker has not run."""
        return self._bounds.get(sequence_id, (0, 0))

    def record(self, sequence_id: int, low: int, high: int) -> None:
        """The worker holds between ``low`` and ``high`` units for a sequence."""
        low_before, high_before = self.of(sequence_id)
        self._bounds[sequence_id] = (low, high)
        self._low += low - low_before
        self._high += high - high_before

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """The worker released these; ones that it never ran are ignored."""
        for sequence_id in sequence_ids:
            low, high = self._bounds.pop(sequence_id, (0, 0))
            self._low -= low
            self._high -= high
