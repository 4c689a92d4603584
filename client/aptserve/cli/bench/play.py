"""The load generator: an open loop, so a service that falls behind is not spared.

When each request is sent is fixed before the run; what was sent later than that is told in the
result, and the delay counts as waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aptserve import AptServeError, AsyncClient, AsyncGenerateStream, Objectives, SamplingParams
from aptserve.cli.bench.stopwatch import Stopwatch
from aptserve.evaluation import RequestRecord
from aptserve.workload import Trace
from aptserve.workload.trace import Ints

DEFAULT_TIMEOUT_SECONDS = 600.0
_NUM_CONNECTIONS = 4
"""Clients are many; a single connection would queue their answers behind one another."""
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Without it gRPC lets equal channels of a process share one connection."""


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What became of a trace that was played against a service."""

    records: tuple[RequestRecord, ...]
    """In order of arrival; times are those that the clients saw."""
    started_at: float
    """When the first request was due, by ``time.monotonic``."""
    duration_seconds: float
    """From the first arrival to the end of the last request."""
    send_delay_seconds: tuple[float, ...]
    """By how much each request was sent later than its arrival says, in the same order."""


async def play_trace(
    trace: Trace,
    *,
    ttft_seconds: float,
    tbt_seconds: float,
    address: str | None = None,
    api_key: str | None = None,
    seed: int = 0,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> LiveRun:
    """Send each request of a trace at its time and wait until all have ended.

    Prompts are random token ids of the served model, equal for equal ``seed``; each request asks
    for exactly as many tokens as the trace says, past any end-of-sequence token, and brings its
    tenant, its priority and the two objectives along. One that fails, is refused, stops short or
    takes more than ``timeout_seconds`` is a record with an error; nothing is resumed or sent again.
    ``address`` and ``api_key`` are those of :class:`aptserve.Client`. ``on_record`` is told of
    each request as it ends.

    Raises :class:`aptserve.AptServeError` when the service does not answer before the run.
    """
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncClient(address, api_key=api_key, resume=False, channel_options=_OWN_CONNECTION)
            )
            for _ in range(_NUM_CONNECTIONS)
        ]
        # Asking through each also connects it, which the first requests would wait for.
        models = await asyncio.gather(*(client.get_model() for client in clients))
        player = _Player(
            trace,
            clients,
            random_prompts(trace, models[0].vocab_size, seed),
            Objectives(ttft_seconds, tbt_seconds),
            timeout_seconds,
            on_record or (lambda _record: None),
        )
        return await player.run()


def random_prompts(trace: Trace, vocab_size: int, seed: int) -> list[Ints]:
    """For each request its prompt, independent token ids in [0, ``vocab_size``)."""
    import numpy as np

    lengths = trace.num_prompt_tokens
    tokens = np.random.default_rng(seed).integers(vocab_size, size=lengths.sum())
    return np.split(tokens, np.cumsum(lengths)[:-1])


class _Player:
    """One run. Times are seconds of ``time.monotonic``."""

    def __init__(
        self,
        trace: Trace,
        clients: Sequence[AsyncClient],
        prompts: Sequence[Ints],
        objectives: Objectives,
        timeout_seconds: float,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        self._trace = trace
        self._clients = clients
        self._prompts = prompts
        self._objectives = objectives
        self._timeout_seconds = timeout_seconds
        self._on_record = on_record
        self._run_id = secrets.token_hex(4)
        self._arrivals: list[float] = trace.arrival_seconds.tolist()
        self._records: list[RequestRecord | None] = [None] * len(trace)
        self._send_delays = [0.0] * len(trace)
        self._started_at = 0.0

    async def run(self) -> LiveRun:
        """Play all of it."""
        self._started_at = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            for index, arrival in enumerate(self._arrivals):
                # Even one that is due already gives those before it a turn to be sent.
                await asyncio.sleep(max(0.0, self._started_at + arrival - time.monotonic()))
                requests.create_task(self._play(index))
        return LiveRun(
            records=tuple(record for record in self._records if record is not None),
            started_at=self._started_at,
            duration_seconds=time.monotonic() - self._started_at,
            send_delay_seconds=tuple(self._send_delays),
        )

    async def _play(self, index: int) -> None:
        due = self._started_at + self._arrivals[index]
        watch = Stopwatch(due)
        error: str | None = None
        num_preemptions = 0
        try:
            async with self._send(index) as stream:
                self._send_delays[index] = time.monotonic() - due
                async for chunk in stream:
                    watch.on_tokens(len(chunk.token_ids), time.monotonic())
            num_preemptions = stream.result.timing.num_preemptions
        except AptServeError as problem:
            error = f"{problem.code.name}: {problem.message}"
        record = self._record(index, watch, error, num_preemptions)
        self._records[index] = record
        self._on_record(record)

    def _send(self, index: int) -> AsyncGenerateStream:
        return self._clients[index % len(self._clients)].generate(
            token_ids=self._prompts[index].tolist(),
            sampling=SamplingParams(
                max_tokens=int(self._trace.num_output_tokens[index]), ignore_eos=True
            ),
            objectives=self._objectives,
            request_id=self._request_id(index),
            timeout=self._timeout_seconds,
            tenant=self._trace.tenants[index],
            priority=int(self._trace.priorities[index]),
        )

    def _request_id(self, index: int) -> str:
        return f"bench-{self._run_id}-{index}"

    def _record(
        self, index: int, watch: Stopwatch, error: str | None, num_preemptions: int
    ) -> RequestRecord:
        now = time.monotonic()
        num_asked = int(self._trace.num_output_tokens[index])
        if error is None and watch.num_tokens != num_asked:
            error = f"ended with {watch.num_tokens} of {num_asked} tokens"
        ttft, tbt = self._objectives.ttft_seconds, self._objectives.tbt_seconds
        assert ttft is not None
        assert tbt is not None
        return RequestRecord(
            request_id=self._request_id(index),
            arrival_seconds=self._arrivals[index],
            num_prompt_tokens=int(self._trace.num_prompt_tokens[index]),
            num_output_tokens=watch.num_tokens,
            ttft_seconds=watch.ttft_seconds,
            tbt_p99_seconds=watch.tbt_p99_seconds,
            total_seconds=watch.total_seconds(now),
            longest_wait_seconds=watch.longest_wait_seconds(now),
            completed=error is None,
            error=error,
            ttft_objective_seconds=ttft,
            tbt_objective_seconds=tbt,
            num_preemptions=num_preemptions,
            tenant=self._trace.tenants[index],
        )
