"""The report of one run: what was offered, and how much of it was served well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aptserve.evaluation.intervals import wilson_interval
from aptserve.evaluation.records import RequestRecord
from aptserve.evaluation.timeline import PoolTimeline

MAX_TIMELINE_SAMPLES = 200


@dataclass(frozen=True, slots=True)
class Cell:
    """What runs have in common that differ in rate and seed alone."""

    workload: str
    system: str
    """Model, hardware and cache tiers, in words."""
    cv: float | None
    """Coefficient of variation of the gaps between arrivals; ``None``: the trace's own arrivals."""
    policy: str
    ttft_objective_seconds: float
    tbt_objective_seconds: float

    @property
    def sort_key(self) -> tuple[object, ...]:
        """Orders cells for tables and files; policies of one case stand together."""
        cv = -1.0 if self.cv is None else self.cv
        objectives = (self.ttft_objective_seconds, self.tbt_objective_seconds)
        return (self.workload, self.system, cv, *objectives, self.policy)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of durations in seconds, by nearest rank."""

    p50: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run in numbers. Shares are of all requests offered, whatever became of them."""

    cell: Cell
    rate: float | None
    """Requests per second that were asked for; ``None``: the trace's own."""
    seed: int
    num_offered: int
    num_completed: int
    """Those that got everything they asked for."""
    num_good: int
    """Complete, with output, and within both objectives."""
    num_ttft_met: int
    """Complete, with output, and the first token in time."""
    num_tbt_met: int
    """Complete, with output, and the P99 time between tokens within bounds."""
    num_without_token: int
    """Requests that ended before their first token; no TTFT below knows them."""
    num_prompt_tokens: int
    """Of all requests offered."""
    num_output_tokens: int
    """Produced, for whatever became of the request."""
    arrival_span_seconds: float
    """From the first arrival to the last."""
    duration_seconds: float
    """From the first arrival to the end of the last request."""
    ttft_seconds: Percentiles | None
    """``None``: no request got a token."""
    missed_ttft_seconds: Percentiles | None
    """TTFT of the requests that were not good; ``None``: all were, or those got no token."""
    longest_wait_seconds: float
    """Longest time that any request spent without a token."""
    num_preemptions: int
    num_promotions: int | None
    """Changes from the hidden tier to KV; ``None``: not known."""
    num_steps: int | None
    """Iterations of all workers; ``None``: not known."""
    tier_shares: Mapping[str, float]
    """Mean share of the pool that each tier held over time; empty: not known."""
    timeline: PoolTimeline | None = None
    note: str = ""
    """What was done to the trace, one line."""

    @property
    def attainment(self) -> float:
        """Share of the requests that were good."""
        return self.num_good / self.num_offered

    @property
    def ttft_attainment(self) -> float:
        """Share of the requests that completed with their first token in time."""
        return self.num_ttft_met / self.num_offered

    @property
    def tbt_attainment(self) -> float:
        """Share of the requests that completed with their time between tokens within bounds."""
        return self.num_tbt_met / self.num_offered

    @property
    def completed_share(self) -> float:
        """Share of the requests that got everything they asked for."""
        return self.num_completed / self.num_offered

    @property
    def attainment_interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of :attr:`attainment`."""
        return wilson_interval(self.num_good, self.num_offered)

    @property
    def offered_rate(self) -> float | None:
        """Requests per second as they came; ``None`` when all came at once."""
        span = self.arrival_span_seconds
        return (self.num_offered - 1) / span if span else None

    @property
    def requests_per_second(self) -> float:
        """Completed requests over the whole duration."""
        return self._per_second(self.num_completed)

    @property
    def output_tokens_per_second(self) -> float:
        """Produced tokens over the whole duration."""
        return self._per_second(self.num_output_tokens)

    def _per_second(self, count: int) -> float:
        return count / self.duration_seconds if self.duration_seconds else 0.0


def report_of(
    cell: Cell,
    records: Sequence[RequestRecord],
    *,
    rate: float | None,
    seed: int,
    duration_seconds: float,
    num_promotions: int | None = None,
    num_steps: int | None = None,
    timeline: PoolTimeline | None = None,
    keep_timeline: bool = False,
    note: str = "",
) -> RunReport:
    """Sum up the records of a run; ValueError when there are none.

    ``timeline`` gives the tiers' shares; the report has it, thinned, only on ``keep_timeline``.
    """
    if not records:
        raise ValueError("records: at least one request is needed")
    served = [record for record in records if record.completed and record.num_output_tokens > 0]
    arrivals = [record.arrival_seconds for record in records]
    kept = timeline.thinned(MAX_TIMELINE_SAMPLES) if timeline and keep_timeline else None
    return RunReport(
        cell=cell,
        rate=rate,
        seed=seed,
        num_offered=len(records),
        num_completed=sum(record.completed for record in records),
        num_good=sum(record.is_good for record in records),
        num_ttft_met=sum(record.ttft_met for record in served),
        num_tbt_met=sum(record.tbt_met for record in served),
        num_without_token=sum(record.ttft_seconds is None for record in records),
        num_prompt_tokens=sum(record.num_prompt_tokens for record in records),
        num_output_tokens=sum(record.num_output_tokens for record in records),
        arrival_span_seconds=max(arrivals) - min(arrivals),
        duration_seconds=duration_seconds,
        ttft_seconds=_ttft_percentiles(records),
        missed_ttft_seconds=_ttft_percentiles(r for r in records if not r.is_good),
        longest_wait_seconds=max(record.longest_wait_seconds for record in records),
        num_preemptions=sum(record.num_preemptions for record in records),
        num_promotions=num_promotions,
        num_steps=num_steps,
        tier_shares=timeline.mean_shares() if timeline else {},
        timeline=kept,
        note=note,
    )


def _ttft_percentiles(records: Iterable[RequestRecord]) -> Percentiles | None:
    values = [record.ttft_seconds for record in records if record.ttft_seconds is not None]
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99], method="inverted_cdf").tolist()
    return Percentiles(p50, p99, max(values))
