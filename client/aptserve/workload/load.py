"""One entry for everything that plays requests: a name or a path becomes a trace."""

from __future__ import annotations

import math
from pathlib import Path

from aptserve.workload.lengths import LENGTH_MODELS
from aptserve.workload.operations import (
    Clipping,
    Source,
    check_rate,
    clipped,
    sampled,
    scaled_to_rate,
    with_gamma_arrivals,
)
from aptserve.workload.readers import read_workload
from aptserve.workload.trace import Lengths, Trace

DEFAULT_NUM_REQUESTS = 1000
"""Of a synthetic workload: as many as the paper samples from each dataset."""


def workload_names() -> tuple[str, ...]:
    """Synthetic workloads, available without any file."""
    return tuple(LENGTH_MODELS)


def load_workload(
    source: str,
    *,
    num_requests: int | None,
    seed: int,
    max_total_tokens: int | None = None,
    rate: float | None = None,
    cv: float | None = None,
) -> Trace:
    """The trace to play, equal for equal arguments (and files).

    - ``source``: one of :func:`workload_names`, or the path of a trace file (ServeGen: or folder).
    - ``num_requests``: how many; ``None`` for all of a file, 1,000 of a synthetic workload. From a
      file with arrivals a window of neighbours is taken, from one without any at random.
    - ``max_total_tokens``: the context. Where arrivals are real, prompts are cut to it, so that
      bursts survive; where they are not, longer requests are left out. The synthetic ``longbench``
      is cut as well.
    - ``rate`` in requests per second, ``cv`` the coefficient of variation of the gaps. With both:
      gamma arrivals. Rate alone: real arrivals scaled by one factor, else a Poisson process.
      Neither: real arrivals as they are.

    ValueError names the argument that is wrong, :class:`TraceFormatError` the place in the file.
    """
    _check(num_requests, seed, max_total_tokens, rate, cv)
    requests = _requests(source, num_requests, seed, max_total_tokens)
    if rate is not None and (cv is not None or isinstance(requests, Lengths)):
        return with_gamma_arrivals(requests, rate, 1.0 if cv is None else cv, seed)
    if isinstance(requests, Lengths):
        raise ValueError(f"rate: is needed, {source} has no arrivals of its own")
    return requests if rate is None else scaled_to_rate(requests, rate)


def _requests(
    source: str, num_requests: int | None, seed: int, max_total_tokens: int | None
) -> Trace | Lengths:
    path = Path(source)
    if source in LENGTH_MODELS:
        count = DEFAULT_NUM_REQUESTS if num_requests is None else num_requests
        return LENGTH_MODELS[source].draw(count, seed, max_total_tokens)
    if not path.exists():
        names = ", ".join(workload_names())
        raise ValueError(f"source: {source!r} is neither a file nor one of {names}")
    requests = read_workload(path, seed=seed)
    if isinstance(requests, Trace):
        return _fitted(requests, num_requests, seed, max_total_tokens, "cut")
    return _fitted(requests, num_requests, seed, max_total_tokens, "drop")


def _fitted(
    requests: Source, num_requests: int | None, seed: int, limit: int | None, how: Clipping
) -> Source:
    if limit is not None:
        requests = clipped(requests, limit, how)
    return requests if num_requests is None else sampled(requests, num_requests, seed)


def _check(
    num_requests: int | None,
    seed: int,
    max_total_tokens: int | None,
    rate: float | None,
    cv: float | None,
) -> None:
    """Refuse what is out of range before a long file is read."""
    if num_requests is not None and num_requests < 1:
        raise ValueError(f"num_requests: must be at least 1, not {num_requests}")
    if seed < 0:
        raise ValueError(f"seed: must be at least 0, not {seed}")
    if max_total_tokens is not None and max_total_tokens < 2:
        raise ValueError(f"max_total_tokens: must be at least 2, not {max_total_tokens}")
    if rate is not None:
        check_rate(rate)
    if cv is not None and rate is None:
        raise ValueError("cv: needs a rate as well")
    if cv is not None and not (math.isfinite(cv) and cv >= 0):
        raise ValueError(f"cv: must be at least 0 and finite, not {cv:g}")
