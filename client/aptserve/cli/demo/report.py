"""What a run came to, the closing table, and a closing sentence that holds whatever came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from aptserve.cli.values import format_seconds
from aptserve.evaluation import RequestRecord
from aptserve.types import Totals

_CHANCE_SHARE = 0.05
"""A difference in fewer of the requests than this says nothing in a single run."""
_NOTABLE_RATIO = 1.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run in figures. Durations are seconds; ``None`` where a first token never came."""

    policy: str
    num_requests: int
    num_met: int
    """Within both objectives."""
    num_ttft_met: int
    num_tbt_met: int
    num_completed: int
    ttft_p50_seconds: float | None
    ttft_p99_seconds: float | None
    """Nearest-rank, a first token that never came counted as the longest."""
    longest_wait_seconds: float
    """Longest time in which a request got no token."""
    tokens_per_second: float
    duration_seconds: float
    num_preemptions: int
    num_promotions: int


def summarise(
    policy: str,
    records: Sequence[RequestRecord],
    duration_seconds: float,
    before: Totals,
    after: Totals,
) -> Outcome:
    """Figures of the records, at least one, and of what the service counted meanwhile."""
    num_tokens = sum(record.num_output_tokens for record in records)
    return Outcome(
        policy=policy,
        num_requests=len(records),
        num_met=sum(record.is_good for record in records),
        num_ttft_met=sum(record.ttft_met for record in records),
        num_tbt_met=sum(record.tbt_met for record in records),
        num_completed=sum(record.completed for record in records),
        ttft_p50_seconds=_ttft_percentile(records, 0.50),
        ttft_p99_seconds=_ttft_percentile(records, 0.99),
        longest_wait_seconds=max(record.longest_wait_seconds for record in records),
        tokens_per_second=num_tokens / max(duration_seconds, 1e-9),
        duration_seconds=duration_seconds,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        num_promotions=after.num_promotions - before.num_promotions,
    )


def closing_table(outcomes: Sequence[Outcome]) -> Table:
    """The runs side by side."""
    table = Table(title="What came of it", title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.policy, justify="right")
    for label, show in _ROWS:
        table.add_row(label, *(show(outcome) for outcome in outcomes))
    return table


def closing_sentence(first: Outcome, second: Outcome) -> str:
    """Who let more requests meet their objectives, by how much, and at which price."""
    counts = (
        f"{second.policy} met the objectives of {second.num_met} of {second.num_requests} "
        f"requests, {first.policy} of {first.num_met}"
    )
    difference = second.num_met - first.num_met
    if abs(difference) < _CHANCE_SHARE * second.num_requests:
        return f"No clear winner here: {counts}, which may be chance."
    if difference < 0:
        return f"{second.policy} did worse than {first.policy} here: {counts}."
    return (
        f"With the same model and memory, {counts}{_factor(first, second)}{_price(first, second)}."
    )


def _factor(first: Outcome, second: Outcome) -> str:
    if not first.num_met:
        return ""
    return f" ({second.num_met / first.num_met:.1f} times as many)"


def _price(first: Outcome, second: Outcome) -> str:
    prices = []
    if second.longest_wait_seconds > _NOTABLE_RATIO * first.longest_wait_seconds:
        prices.append(
            f"a longest wait of {format_seconds(second.longest_wait_seconds)} instead of "
            f"{format_seconds(first.longest_wait_seconds)}"
        )
    if first.tokens_per_second > _NOTABLE_RATIO * second.tokens_per_second:
        prices.append(
            f"{second.tokens_per_second:.0f} tokens per second instead of "
            f"{first.tokens_per_second:.0f}"
        )
    return f"; the price is {' and '.join(prices)}" if prices else ""


def _ttft_percentile(records: Sequence[RequestRecord], share: float) -> float | None:
    ttfts = sorted(
        math.inf if record.ttft_seconds is None else record.ttft_seconds for record in records
    )
    value = ttfts[math.ceil(share * len(ttfts)) - 1]
    return value if math.isfinite(value) else None


def _share(count: int, outcome: Outcome) -> str:
    return f"{count} of {outcome.num_requests} ({count / outcome.num_requests:.0%})"


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else format_seconds(seconds)


_ROWS: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("both objectives met", lambda run: _share(run.num_met, run)),
    ("  first token in time", lambda run: _share(run.num_ttft_met, run)),
    ("  tokens in even time", lambda run: _share(run.num_tbt_met, run)),
    ("answered in full", lambda run: _share(run.num_completed, run)),
    ("time to first token, median", lambda run: _seconds(run.ttft_p50_seconds)),
    ("time to first token, P99", lambda run: _seconds(run.ttft_p99_seconds)),
    ("longest wait without a token", lambda run: _seconds(run.longest_wait_seconds)),
    ("tokens per second", lambda run: f"{run.tokens_per_second:.0f}"),
    ("preemptions (memory lost)", lambda run: str(run.num_preemptions)),
)
