"""Prometheus metrics of the service.

Names are those that dashboards of other engines know, under the prefix ``aptserve:``. Bucket bounds
are those of the OpenTelemetry conventions for generative AI. Counters and histograms are kept on
the event loop; gauges are read from the scheduler when somebody scrapes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from aptserve_scheduler.core import BatchPlan, FinishReason, RequestTiming, Tier
from aptserve_scheduler.stream import RequestStream

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08),
    *(0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_DECISION_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
_SCRAPE_TIMEOUT_SECONDS = 5.0

ReadState = Callable[[], Iterable[Metric]]


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._server: WSGIServer | None = None
        self._make_histograms()
        self._make_counters()

    def _make_histograms(self) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"aptserve:{name}", text, buckets=buckets, registry=self.registry)

        self.ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between tokens of one request.", _TOKEN_BUCKETS
        )
        self.e2e = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _LONG_BUCKETS
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "From arrival until a batch took it.", _LONG_BUCKETS
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds",
            "From the first batch to the first token.",
            _LONG_BUCKETS,
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "From the first token to the end.", _LONG_BUCKETS
        )
        self.decision_time = histogram(
            "decision_time_seconds", "Composing one batch.", _DECISION_BUCKETS
        )

    def _make_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"aptserve:{name}", text, labels, registry=self.registry)

        self.success = counter("request_success", "Requests that ended well.", "finished_reason")
        self.failures = counter("request_failure", "Requests that failed.")
        self.objectives = counter(
            "request_objectives", "Finished requests by whether both objectives were met.", "met"
        )
        self.batches = counter("batches", "Batches sent.", "worker")
        self.batch_sequences = counter(
            "batch_sequences", "Sequences in the batches sent.", "worker", "tier"
        )
        self.batch_tokens = counter(
            "batch_tokens", "Tokens computed in the batches sent.", "worker", "tier"
        )

    def observe_plan(self, plan: BatchPlan, decision_seconds: float) -> None:
        """Count a plan that was sent."""
        self.decision_time.observe(decision_seconds)
        self.batches.labels(plan.worker_id).inc()
        num_tokens: defaultdict[Tier, int] = defaultdict(int)
        num_sequences: defaultdict[Tier, int] = defaultdict(int)
        for part in plan.scheduled:
            num_tokens[part.tier] += part.num_new_tokens
            num_sequences[part.tier] += 1
        for tier, count in num_sequences.items():
            labels = (plan.worker_id, tier.name.lower())
            self.batch_sequences.labels(*labels).inc(count)
            self.batch_tokens.labels(*labels).inc(num_tokens[tier])

    def observe_tokens(self, stream: RequestStream, count: int, now: float) -> None:
        """Time new tokens of a request by the tokens before them."""
        last, stream.last_token_at = stream.last_token_at, now
        if last is None:
            self.ttft.observe(now - stream.arrival)
            return
        for _ in range(count):
            self.inter_token.observe((now - last) / count)

    def observe_end(self, reason: FinishReason, timing: RequestTiming) -> None:
        """Count a request that ended well or was aborted."""
        self.success.labels(reason.value).inc()
        self.e2e.observe(timing.total_seconds)
        self.queue_time.observe(timing.queued_seconds)
        if timing.ttft_seconds is not None:
            self.prefill_time.observe(max(0.0, timing.ttft_seconds - timing.queued_seconds))
            self.decode_time.observe(max(0.0, timing.total_seconds - timing.ttft_seconds))
        if reason is not FinishReason.ABORT:
            self.objectives.labels("yes" if timing.objectives_met else "no").inc()

    def serve(self, host: str, port: int, read_state: ReadState) -> int:
        """Serve ``/metrics`` from a thread; returns the port.

        ``read_state`` is called on the event loop that calls this. Raises ``OSError`` when the
        address cannot be had.
        """
        loop = asyncio.get_running_loop()
        self.registry.register(_LoopCollector(loop, read_state))
        self._server, _ = start_http_server(port, host, self.registry)
        return self._server.server_port

    def close(self) -> None:
        """Stop serving. Blocks for a moment: not for the event loop."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _LoopCollector(Collector):
    """Asks the event loop for the gauges: only it may touch the scheduler."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read_state: ReadState) -> None:
        self._loop = loop
        self._read_state = read_state

    def collect(self) -> Iterable[Metric]:
        async def read() -> list[Metric]:
            return list(self._read_state())

        future = asyncio.run_coroutine_threadsafe(read(), self._loop)
        return future.result(_SCRAPE_TIMEOUT_SECONDS)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not wait for the loop that registers."""
        return []
