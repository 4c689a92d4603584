"""Requests to play: how long they are and, for a trace, when they arrive."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Lengths of requests without arrivals. The arrays are read-only copies.

    ValueError names a field that is not as described.
    """

    name: str
    num_prompt_tokens: Ints
    """[n], at least 1 each; n is at least 1."""
    num_output_tokens: Ints
    """[n], at least 1 each."""
    note: str = ""
    """What was done to the lengths, one line."""

    def __post_init__(self) -> None:
        prompts = _token_counts("num_prompt_tokens", self.num_prompt_tokens)
        outputs = _token_counts("num_output_tokens", self.num_output_tokens)
        _check_length("num_output_tokens", len(outputs), len(prompts))
        object.__setattr__(self, "num_prompt_tokens", prompts)
        object.__setattr__(self, "num_output_tokens", outputs)

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    def take(self, indices: Ints, note: str) -> Lengths:
        """The requests at these indices [m], in that order; ``note`` is added to the note."""
        return Lengths(
            self.name,
            self.num_prompt_tokens[indices],
            self.num_output_tokens[indices],
            joined(self.note, note),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival. The arrays are read-only copies.

    ValueError names a field that is not as described.
    """

    name: str
    arrival_seconds: Floats
    """[n], ascending (equal ones allowed), the first is 0; n is at least 1."""
    num_prompt_tokens: Ints
    """[n], at least 1 each."""
    num_output_tokens: Ints
    """[n], at least 1 each."""
    tenants: tuple[str, ...]
    """[n], empty for none."""
    priorities: Ints
    """[n], 0 is normal, higher is more urgent."""
    note: str = ""
    """What was done to the trace (requests cut, ticks spread, ...), one line."""

    def __post_init__(self) -> None:
        arrivals = _arrivals(self.arrival_seconds)
        prompts = _token_counts("num_prompt_tokens", self.num_prompt_tokens)
        outputs = _token_counts("num_output_tokens", self.num_output_tokens)
        priorities = _integers("priorities", self.priorities)
        _check_length("num_prompt_tokens", len(prompts), len(arrivals))
        _check_length("num_output_tokens", len(outputs), len(arrivals))
        _check_length("tenants", len(self.tenants), len(arrivals))
        _check_length("priorities", len(priorities), len(arrivals))
        object.__setattr__(self, "arrival_seconds", arrivals)
        object.__setattr__(self, "num_prompt_tokens", prompts)
        object.__setattr__(self, "num_output_tokens", outputs)
        object.__setattr__(self, "tenants", tuple(self.tenants))
        object.__setattr__(self, "priorities", priorities)

    def __len__(self) -> int:
        return len(self.arrival_seconds)

    @property
    def rate(self) -> float:
        """Requests per second, (n - 1) / last arrival; infinite when all arrive at once."""
        last = float(self.arrival_seconds[-1])
        return (len(self) - 1) / last if last > 0 else math.inf

    def take(self, indices: Ints, note: str) -> Trace:
        """The requests at these ascending indices [m], the first one arriving at 0."""
        arrivals = self.arrival_seconds[indices]
        return Trace(
            self.name,
            arrivals - arrivals[:1],
            self.num_prompt_tokens[indices],
            self.num_output_tokens[indices],
            tuple(self.tenants[index] for index in indices.tolist()),
            self.priorities[indices],
            joined(self.note, note),
        )


def trace_of(
    name: str, arrival_seconds: Floats, num_prompt_tokens: Ints, num_output_tokens: Ints, note: str
) -> Trace:
    """A trace of requests that have no tenant and are all equally urgent."""
    n = len(arrival_seconds)
    return Trace(
        name,
        arrival_seconds,
        num_prompt_tokens,
        num_output_tokens,
        ("",) * n,
        np.zeros(n, np.int64),
        note,
    )


def joined(*notes: str) -> str:
    """One line of the notes that are not empty."""
    return "; ".join(note for note in notes if note)


def _arrivals(values: ArrayLike) -> Floats:
    arrivals = np.array(values, np.float64)
    if arrivals.ndim != 1 or arrivals.size == 0:
        raise ValueError("arrival_seconds: must be one-dimensional and not empty")
    if not np.isfinite(arrivals).all():
        raise ValueError("arrival_seconds: must be finite")
    if arrivals[0] != 0:
        raise ValueError(f"arrival_seconds: the first must be 0, not {arrivals[0]:g}")
    if (np.diff(arrivals) < 0).any():
        index = int(np.argmax(np.diff(arrivals) < 0)) + 1
        raise ValueError(f"arrival_seconds: must ascend, but falls at index {index}")
    arrivals.setflags(write=False)
    return arrivals


def _token_counts(field: str, values: ArrayLike) -> Ints:
    counts = _integers(field, values)
    if counts.size == 0:
        raise ValueError(f"{field}: must not be empty")
    if counts.min() < 1:
        raise ValueError(f"{field}: must be at least 1, not {counts.min()}")
    return counts


def _integers(field: str, values: ArrayLike) -> Ints:
    numbers = np.array(values)
    if numbers.ndim != 1:
        raise ValueError(f"{field}: must be one-dimensional")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ValueError(f"{field}: must be integers, not {numbers.dtype}")
    integers = numbers.astype(np.int64)
    integers.setflags(write=False)
    return integers


def _check_length(field: str, length: int, expected: int) -> None:
    if length != expected:
        raise ValueError(f"{field}: has {length} entries for {expected} requests")
