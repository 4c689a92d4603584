"""What may be done to requests before they are played; each step is told in the note."""

from __future__ import annotations

import dataclasses
import math
from enum import IntEnum
from typing import Literal, TypeVar

import numpy as np

from aptserve.workload.trace import Floats, Ints, Lengths, Trace, joined, trace_of

Clipping = Literal["drop", "cut"]
Source = TypeVar("Source", Trace, Lengths)


class Stream(IntEnum):
    """Uses of a seed; each draws its own numbers, so that a choice in one leaves others alone."""

    ARRIVALS = 1
    SAMPLE = 2
    LENGTHS = 3
    CLIENTS = 4


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Random numbers of one use of the seed; ValueError when the seed is negative."""
    if seed < 0:
        raise ValueError(f"seed: must be at least 0, not {seed}")
    return np.random.default_rng([seed, stream, *keys])


def scaled_to_rate(trace: Trace, rate: float) -> Trace:
    """The trace at ``rate`` requests per second: one factor on all arrivals, so bursts survive.

    A trace of a single request has no rate and comes back as it is.
    """
    check_rate(rate)
    if len(trace) == 1:
        return trace
    if math.isinf(trace.rate):
        raise ValueError(f"rate: {trace.name} has all its arrivals at once, nothing to scale")
    return dataclasses.replace(
        trace,
        arrival_seconds=trace.arrival_seconds * (trace.rate / rate),
        note=joined(trace.note, f"arrivals scaled from {trace.rate:.4g} to {rate:.4g}/s"),
    )


def with_gamma_arrivals(source: Trace | Lengths, rate: float, cv: float, seed: int) -> Trace:
    """The requests in their order with gaps drawn anew from a gamma distribution.

    ``rate`` is its mean in requests per second and ``cv`` the gaps' coefficient of variation
    (standard deviation over mean): shape 1/cv², scale cv²/rate seconds. 1 is a Poisson process,
    0 even gaps. For one seed and cv, arrivals at two rates differ by one factor.

    The drawn rate differs from ``rate`` by a relative standard deviation of cv/sqrt(n - 1).
    """
    check_rate(rate)
    if not (math.isfinite(cv) and cv >= 0):
        raise ValueError(f"cv: must be at least 0 and finite, not {cv:g}")
    arrivals = np.zeros(len(source))
    np.cumsum(_unit_gaps(len(source) - 1, cv, seed) / rate, out=arrivals[1:])
    kind = {0.0: "evenly spaced", 1.0: "Poisson"}.get(float(cv), f"gamma (CV {cv:g})")
    note = joined(source.note, f"{kind} arrivals at {rate:.4g}/s, seed {seed}")
    if isinstance(source, Trace):
        return dataclasses.replace(source, arrival_seconds=arrivals, note=note)
    return trace_of(source.name, arrivals, source.num_prompt_tokens, source.num_output_tokens, note)


def sampled(source: Source, num_requests: int, seed: int) -> Source:
    """``num_requests`` of the requests: without arrivals any, in random order and none twice;
    with arrivals a window of neighbours from a random place, so that bursts survive.
    """
    if not 1 <= num_requests <= len(source):
        raise ValueError(
            f"num_requests: must be in [1, {len(source)}], the requests of {source.name}, "
            f"not {num_requests}"
        )
    if num_requests == len(source):
        return source
    rng = generator(seed, Stream.SAMPLE)
    of_all = f"{num_requests:,} of {len(source):,} requests"
    if isinstance(source, Lengths):
        chosen = rng.permutation(len(source))[:num_requests]
        return source.take(chosen, f"{of_all} at random, seed {seed}")
    first = int(rng.integers(len(source) - num_requests + 1))
    window = np.arange(first, first + num_requests)
    return source.take(window, f"{of_all}, a window from number {first:,}")


def clipped(source: Source, max_total_tokens: int, how: Clipping) -> Source:
    """The requests within a context of ``max_total_tokens``, prompt and output together.

    ``drop`` leaves longer requests out; ``cut`` shortens their prompts, and outputs that leave no
    room for one prompt token. The note says how many.
    """
    if max_total_tokens < 2:
        raise ValueError(f"max_total_tokens: must be at least 2, not {max_total_tokens}")
    fits = source.num_prompt_tokens + source.num_output_tokens <= max_total_tokens
    if fits.all():
        return source
    num_over = int((~fits).sum())
    over = f"{num_over:,} of {len(source):,} requests over {max_total_tokens:,} tokens"
    if how == "cut":
        return _cut(source, max_total_tokens, over)
    if num_over == len(source):
        raise ValueError(
            f"max_total_tokens: every request of {source.name} has more than {max_total_tokens}"
        )
    return source.take(np.flatnonzero(fits), f"{over} dropped")


def check_rate(rate: float) -> None:
    """Raise ValueError unless this is a number of requests per second."""
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: must be above 0 and finite, not {rate:g}")


def _cut(source: Source, max_total_tokens: int, over: str) -> Source:
    outputs = np.minimum(source.num_output_tokens, max_total_tokens - 1)
    prompts = np.minimum(source.num_prompt_tokens, max_total_tokens - outputs)
    num_outputs_cut = int((outputs < source.num_output_tokens).sum())
    cut = "prompts cut" + (f", {num_outputs_cut:,} outputs too" if num_outputs_cut else "")
    return _with_lengths(source, prompts, outputs, joined(source.note, f"{over}: {cut}"))


def _with_lengths(source: Source, prompts: Ints, outputs: Ints, note: str) -> Source:
    return dataclasses.replace(
        source, num_prompt_tokens=prompts, num_output_tokens=outputs, note=note
    )


def _unit_gaps(num_gaps: int, cv: float, seed: int) -> Floats:
    """Gaps [num_gaps] of mean 1."""
    if cv == 0:
        return np.ones(num_gaps)
    shape = cv**-2
    return generator(seed, Stream.ARRIVALS).standard_gamma(shape, num_gaps) / shape
