"""What the pool and the queue looked like over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PoolTimeline:
    """Samples of one length m, by rising time; each holds until the next one.

    ValueError when the lengths differ or there is no sample.
    """

    seconds: tuple[float, ...]
    """[m], since the first arrival."""
    num_waiting: tuple[int, ...]
    num_running: tuple[int, ...]
    num_units: int
    """Memory units of all pools."""
    used_units: Mapping[str, tuple[int, ...]]
    """[m] by tier name, such as ``kv`` and ``hidden``."""

    def __post_init__(self) -> None:
        lengths = {len(series) for series in (self.num_waiting, self.num_running)}
        lengths |= {len(series) for series in self.used_units.values()}
        if not self.seconds or lengths != {len(self.seconds)}:
            raise ValueError(
                f"timeline: {len(self.seconds)} times for series of {sorted(lengths)} samples"
            )

    def mean_shares(self) -> dict[str, float]:
        """Mean share of the units that each tier held, over time."""
        if not self.num_units:
            return dict.fromkeys(self.used_units, 0.0)
        durations = np.diff(self.seconds)
        whole = float(durations.sum()) * self.num_units
        if not whole:
            return {tier: used[-1] / self.num_units for tier, used in self.used_units.items()}
        return {
            tier: float(np.dot(durations, used[:-1])) / whole
            for tier, used in self.used_units.items()
        }

    def thinned(self, max_samples: int) -> PoolTimeline:
        """At most so many of the samples (2 at least), evenly over time, with both ends."""
        if len(self.seconds) <= max_samples:
            return self
        times = np.linspace(self.seconds[0], self.seconds[-1], max_samples)
        chosen = np.unique(np.searchsorted(self.seconds, times, side="right") - 1)
        chosen[-1] = len(self.seconds) - 1
        indices: list[int] = chosen.tolist()
        return PoolTimeline(
            seconds=tuple(self.seconds[i] for i in indices),
            num_waiting=_taken(self.num_waiting, indices),
            num_running=_taken(self.num_running, indices),
            num_units=self.num_units,
            used_units={tier: _taken(used, indices) for tier, used in self.used_units.items()},
        )


def _taken(values: Sequence[int], indices: list[int]) -> tuple[int, ...]:
    return tuple(values[index] for index in indices)
