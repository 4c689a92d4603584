"""Random numbers that depend on a request's seed and the output position, and on nothing else."""

from __future__ import annotations

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for output ``position`` of a request with ``seed``.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over seed and position: no state
    to keep, so a request that was preempted or moved draws the same numbers again.
    """
    mixed = _mix(_mix(seed & _MASK) + (position + 1) * _GOLDEN)
    return (mixed >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
