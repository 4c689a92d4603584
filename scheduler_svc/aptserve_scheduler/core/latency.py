"""What is reported of a request's time when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aptserve_scheduler.core.table import Request
from aptserve_scheduler.core.types import RequestTiming


def nearest_rank_p99(values: Sequence[float]) -> float | None:
    """The smallest value that at least 99 % of the values do not exceed; ``None`` without any."""
    if not values:
        return None
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def timing_of(request: Request, arrival: float, now: float, *, succeeded: bool) -> RequestTiming:
    """Durations of a request that ends now.

    Objectives are met when the request succeeded, its first token came in time and the P99 of its
    gaps is within bounds. A single token has no gaps; no token at all is only in time when the
    caller had brought every token along, which nobody had to wait for.
    """
    taken = request.first_taken_at
    ttft = None if request.first_token_at is None else request.first_token_at - arrival
    longest_gap = max(request.gap_seconds, default=0.0)
    p99 = nearest_rank_p99(request.gap_seconds)
    objectives = request.spec.objectives
    in_time = ttft is None or ttft <= objectives.ttft_seconds
    steady = p99 is None or p99 <= objectives.tbt_seconds
    has_output = bool(request.output_token_ids)
    return RequestTiming(
        queued_seconds=(now if taken is None else taken) - arrival,
        ttft_seconds=ttft,
        tbt_p99_seconds=p99,
        total_seconds=now - arrival,
        longest_wait_seconds=max(now - arrival if ttft is None else ttft, longest_gap),
        num_preemptions=request.num_preemptions,
        objectives_met=succeeded and has_output and in_time and steady,
    )
