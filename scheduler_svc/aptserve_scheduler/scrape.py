"""Prometheus samples of what the scheduler core counts itself."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aptserve_scheduler.core import SchedulerSnapshot, WorkerSnapshot

_TOTALS = (
    ("prompt_tokens", "num_prompt_tokens", "Prompt tokens of accepted requests."),
    ("generation_tokens", "num_output_tokens", "Tokens generated."),
    ("num_preemptions", "num_preemptions", "Times a request lost its memory."),
    ("num_promotions", "num_promotions", "Requests moved from hidden states to keys and values."),
    ("request_rejected", "num_rejected", "Requests refused because the queue was full."),
)


def read_state(snapshot: SchedulerSnapshot) -> Iterator[Metric]:
    """Totals, queue and use of memory."""
    for name, field, text in _TOTALS:
        yield CounterMetricFamily(f"aptserve:{name}", text, value=getattr(snapshot.totals, field))
    for name, value, text in (
        ("num_requests_running", snapshot.num_running, "Requests that hold memory."),
        ("num_requests_waiting", snapshot.num_waiting, "Requests that wait."),
        ("oldest_wait_seconds", snapshot.oldest_wait_seconds, "Age of the oldest wait."),
        ("num_workers", len(snapshot.workers), "Workers attached."),
    ):
        yield GaugeMetricFamily(f"aptserve:{name}", text, value=value)
    yield from _read_workers(snapshot.workers)


def _read_workers(workers: tuple[WorkerSnapshot, ...]) -> Iterator[Metric]:
    def family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"aptserve:{name}", text, labels=("worker", *labels))

    units = family("num_units", "Units in the pool.")
    share = family("kv_cache_usage_perc", "Share of the units in use, 0 to 1.")
    gap = family("gap_share", "Share of the time between steps in busy time, 0 to 1.")
    used = family("num_used_units", "Units in use.", "tier")
    sequences = family("num_sequences", "Sequences that hold memory.", "tier")
    for worker in workers:
        labels = [worker.worker_id]
        units.add_metric(labels, worker.num_units)
        share.add_metric(labels, worker.num_used_units / worker.num_units)
        gap.add_metric(labels, worker.gap_share)
        for tier in worker.tiers:
            tier_labels = [*labels, tier.tier.name.lower()]
            used.add_metric(tier_labels, tier.num_used_units)
            sequences.add_metric(tier_labels, tier.num_sequences)
    yield from (units, share, gap, used, sequences)
