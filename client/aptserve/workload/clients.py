"""Many clients, each with its own gaps and lengths, drawn into one trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aptserve.workload.operations import Stream, generator
from aptserve.workload.trace import Floats, Ints, Trace

Pattern = Literal["Gamma", "Weibull"]

_SETTLING_GAPS = 100
"""A client's arrivals start so many mean gaps before its window, to be in their stride there."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """A distribution of token counts."""

    tokens: Ints
    """[k]"""
    cumulative: Floats
    """[k], of their probabilities; the last is 1."""

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Token counts [count]."""
        return self.tokens[np.searchsorted(self.cumulative, rng.random(count), side="right")]


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """What one client sends from begin to end."""

    client: str
    begin_seconds: float
    end_seconds: float
    rate: float
    """Requests per second, above 0."""
    pattern: Pattern
    shape: float
    """Of the gaps' distribution; the scale is such that their mean is 1 / rate."""
    prompts: TokenCounts
    outputs: TokenCounts

    def arrivals(self, rng: np.random.Generator) -> Floats:
        """Times of the requests, ascending, in ``[begin, end)``."""
        last = self.begin_seconds - _SETTLING_GAPS / self.rate
        times = [np.empty(0)]
        while last < self.end_seconds:
            expected = math.ceil((self.end_seconds - last) * self.rate)
            times.append(last + np.cumsum(self._gaps(expected + _SETTLING_GAPS, rng)))
            last = float(times[-1][-1])
        drawn = np.concatenate(times)
        return drawn[(drawn >= self.begin_seconds) & (drawn < self.end_seconds)]

    def _gaps(self, count: int, rng: np.random.Generator) -> Floats:
        if self.pattern == "Gamma":
            return rng.standard_gamma(self.shape, count) / (self.shape * self.rate)
        return rng.weibull(self.shape, count) / (math.gamma(1 + 1 / self.shape) * self.rate)


def draw_clients(name: str, windows: Sequence[ClientWindow], seed: int, note: str) -> Trace:
    """The requests of all windows in the order of arrival; tenants are the clients.

    ValueError when no request arrives in any of them.
    """
    generators = [generator(seed, Stream.CLIENTS, index) for index in range(len(windows))]
    pairs = list(zip(windows, generators, strict=True))
    arrivals = [window.arrivals(rng) for window, rng in pairs]
    counts = [len(times) for times in arrivals]
    seconds = np.concatenate(arrivals)
    if not len(seconds):
        raise ValueError(f"{name}: no request arrives in the time asked for")
    prompts = [window.prompts.draw(n, rng) for (window, rng), n in zip(pairs, counts, strict=True)]
    outputs = [window.outputs.draw(n, rng) for (window, rng), n in zip(pairs, counts, strict=True)]
    sender = np.repeat(np.arange(len(windows)), counts)
    order = np.argsort(seconds, kind="stable")
    return Trace(
        name,
        seconds[order] - seconds[order[0]],
        np.concatenate(prompts)[order],
        np.concatenate(outputs)[order],
        tuple(windows[index].client for index in sender[order].tolist()),
        np.zeros(len(order), np.int64),
        note,
    )
