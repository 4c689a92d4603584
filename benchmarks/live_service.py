"""A real service with one CPU worker that is short of memory, and traces played against it.

A service per policy runs all along, so that policies can take turns without a start in between;
only one of them has work at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from aptserve import AptServeError, AsyncClient
from aptserve.cli.bench import LiveRun, play_trace
from aptserve.cli.demo.burst import Burst, plan_burst
from aptserve.cli.demo.warm_up import slowdown, warm_up
from aptserve.evaluation import RequestRecord
from aptserve.types import Calibration, Status, TierSeconds, WorkerStatus
from aptserve.workload import Trace
from aptserve.workload.operations import scaled_to_rate

POLICIES = ("fcfs", "chunked", "apt", "apt-slo")
POOL_UNITS = 200
"""1,600 tokens as keys and values: a long prompt, and as much again in short ones."""
PIPELINE_DEPTH = 2
_REHEARSAL_SEED = 1_000
_START_TIMEOUT_SECONDS = 120.0
_STOP_TIMEOUT_SECONDS = 30.0
_REQUEST_TIMEOUT_SECONDS = 120.0
_LOOK_SECONDS = 0.25
_NUM_PINGS = 20
_DRAW_SECONDS = 1e6
"""Of a burst: as many requests as there may be, of which the first are taken."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered, fitted to a worker: the requests of ``aptserve demo``."""

    worker: WorkerStatus
    slowdown: float
    context_length: int
    num_requests: int

    def burst(self, seed: int) -> Burst:
        """Requests without a rate of their own, and the objectives of all."""
        return plan_burst(
            self.worker, self.slowdown, self.context_length, seconds=_DRAW_SECONDS, seed=seed
        )

    @property
    def standard(self) -> Burst:
        """Where objectives and rates come from: equal for all seeds."""
        return self.burst(0)

    def trace(self, times: float, seed: int) -> Trace:
        """Requests at so many times the rate that keys and values alone have the memory for."""
        drawn = self.burst(seed).trace
        first = drawn.take(np.arange(self.num_requests), f"the first {self.num_requests}")
        return scaled_to_rate(first, times * self.standard.sustainable_rate)

    def document(self) -> dict[str, Any]:
        """For the result."""
        standard = self.standard
        return {
            "requests": "those of `aptserve demo`: 15 % with a long prompt; Poisson arrivals",
            "num_requests": self.num_requests,
            "pool_units": self.worker.num_units,
            "sustainable_requests_per_second": standard.sustainable_rate,
            "ttft_objective_seconds": standard.ttft_seconds,
            "tbt_objective_seconds": standard.tbt_seconds,
        }


@dataclass(frozen=True, slots=True)
class Case:
    """One run to make."""

    policy: str
    times: float
    """Rate as a multiple of the sustainable one."""
    seed: int


@dataclass(frozen=True, slots=True)
class Played:
    """One run that was made."""

    case: Case
    trace: Trace
    run: LiveRun
    before: Status
    after: Status
    speeds: tuple[Calibration, ...]
    """The scheduler's estimates of the worker's speed, all along the run."""

    @property
    def shares(self) -> dict[str, float]:
        """See :func:`shares_of`."""
        return shares_of(self.run.records)

    @property
    def num_steps(self) -> int:
        """Iterations."""
        return self.after.workers[0].num_steps - self.before.workers[0].num_steps


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a request costs in time besides its iterations, with nothing else to do."""

    service_seconds: float
    """From the call's arrival at the scheduler to its token there, less the iteration."""
    client_seconds: float
    """What the client sees on top of that."""


def shares_of(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Of all requests: those within both objectives, and within each; a failure is in none."""
    served = [record for record in records if record.completed and record.num_output_tokens > 0]
    return {
        "both": sum(record.is_good for record in served) / len(records),
        "ttft": sum(record.ttft_met for record in served) / len(records),
        "tbt": sum(record.tbt_met for record in served) / len(records),
    }


def mean_speed(speeds: Sequence[Calibration]) -> Calibration:
    """The mean of each coefficient; all have the same tiers. The estimate at one moment is
    of the batches, and the stalls, just before it.
    """

    def mean(name: str) -> float:
        return statistics.fmean(getattr(speed, name) for speed in speeds)

    tiers = [
        TierSeconds(of_tier[0].tier, statistics.fmean(t.seconds_per_cached_token for t in of_tier))
        for of_tier in zip(*(speed.tiers for speed in speeds), strict=True)
    ]
    return Calibration(
        base_seconds=mean("base_seconds"),
        seconds_per_token=mean("seconds_per_token"),
        seconds_per_sequence=mean("seconds_per_sequence"),
        seconds_per_attention_pair=mean("seconds_per_attention_pair"),
        tiers=tuple(tiers),
    )


class LiveService:
    """A running ``aptserve up`` under one policy."""

    def __init__(self, policy: str, client: AsyncClient) -> None:
        self.policy = policy
        self.client = client

    async def plan_load(self, num_requests: int) -> Load:
        """A load for this worker as it is known by now."""
        batch_seconds = await warm_up(self.client)
        worker = (await self.client.status()).workers[0]
        model = await self.client.get_model()
        factor = slowdown(batch_seconds, worker.calibration)
        return Load(worker, factor, model.context_length, num_requests)

    async def play(self, load: Load, times: float, seed: int) -> Played:
        """Play a trace; the same for every policy."""
        trace = load.trace(times, seed)
        objectives = load.standard
        before = await self.client.status()
        speeds: list[Calibration] = []
        looks = asyncio.create_task(self._look(speeds))
        try:
            run = await play_trace(
                trace,
                ttft_seconds=objectives.ttft_seconds,
                tbt_seconds=objectives.tbt_seconds,
                address=self.client.address,
                seed=seed,
                timeout_seconds=_REQUEST_TIMEOUT_SECONDS,
            )
        finally:
            looks.cancel()
            await asyncio.wait({looks})
        after = await self.client.status()
        speeds.append(after.workers[0].calibration)
        case = Case(self.policy, times, seed)
        return Played(case, trace, run, before, after, tuple(speeds))

    async def measure_overheads(self) -> Overheads:
        """Medians over requests of a single token, one after the other."""
        in_service, in_client = [], []
        for _ in range(_NUM_PINGS):
            started = time.perf_counter()
            answer = await self.client.complete(token_ids=[0], max_tokens=1, ignore_eos=True)
            total = answer.timing.total_seconds
            in_service.append(total)
            in_client.append(time.perf_counter() - started - total)
        speed = (await self.client.status()).workers[0].calibration
        step = speed.base_seconds + speed.seconds_per_token + speed.seconds_per_sequence
        return Overheads(
            service_seconds=max(0.0, statistics.median(in_service) - step),
            client_seconds=statistics.median(in_client),
        )

    async def _look(self, speeds: list[Calibration]) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            speeds.append((await self.client.status()).workers[0].calibration)


@asynccontextmanager
async def services(policies: Sequence[str]) -> AsyncIterator[dict[str, LiveService]]:
    """A service per policy, started one after the other, and stopped at the end of the block."""
    async with AsyncExitStack() as stack:
        yield {policy: await stack.enter_async_context(_service(policy)) for policy in policies}


async def play_all(
    running: dict[str, LiveService], cases: Sequence[Case], num_requests: int
) -> tuple[Load, list[Played]]:
    """Rehearse with every service, fit the load to what was learned, and make the runs."""
    say = _Progress(len(cases))
    first = next(iter(running.values()))
    first_guess = await first.plan_load(num_requests)
    rehearsals = []
    for service in running.values():
        await warm_up(service.client)
        rehearsals.append(await service.play(first_guess, 1.0, _REHEARSAL_SEED))
    load = _fitted(first_guess, rehearsals)
    played = []
    for case in cases:
        played.append(await running[case.policy].play(load, case.times, case.seed))
        say(played[-1])
    return load, played


def interleaved(
    times: Sequence[float], seeds: Sequence[int], policies: Sequence[str] = POLICIES
) -> list[Case]:
    """All policies one after the other on each trace, each time another one first."""
    grid = [(seed, factor) for seed in seeds for factor in times]
    return [
        Case(policies[(turn + place) % len(policies)], factor, seed)
        for turn, (seed, factor) in enumerate(grid)
        for place in range(len(policies))
    ]


def _fitted(guess: Load, rehearsals: Sequence[Played]) -> Load:
    """The load for what the workers did in the mean, idle time between iterations included."""
    speed = mean_speed([speed for played in rehearsals for speed in played.speeds])
    gap_share = statistics.fmean(played.after.workers[0].gap_share for played in rehearsals)
    worker = dataclasses.replace(guess.worker, calibration=speed)
    return dataclasses.replace(guess, worker=worker, slowdown=1 / (1 - gap_share))


class _Progress:
    """A line for each run."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._num_done = 0

    def __call__(self, played: Played) -> None:
        self._num_done += 1
        case, shares = played.case, played.shares
        print(
            f"  {self._num_done}/{self._num_runs} {case.policy} at {case.times:g} x, "
            f"seed {case.seed}: {shares['both']:.0%} good (TTFT {shares['ttft']:.0%}, "
            f"TBT {shares['tbt']:.0%}), {played.run.duration_seconds:.1f} s",
            flush=True,
        )


@asynccontextmanager
async def _service(policy: str) -> AsyncIterator[LiveService]:
    address = _free_address()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aptserve.cli", "up", "--listen", address, "--policy", policy),
        *("--pool-units", str(POOL_UNITS), "--pipeline-depth", str(PIPELINE_DEPTH)),
        *("--threads", str(max(1, len(os.sched_getaffinity(0)) - 1))),
        stdout=subprocess.DEVNULL,
    )
    try:
        async with AsyncClient(address) as client:
            await _wait_serving(client, lambda: process.returncode)
            yield LiveService(policy, client)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_SECONDS)


async def _wait_serving(client: AsyncClient, returncode: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while True:
        try:
            status = await client.status()
            if status.accepting and status.workers:
                return
        except AptServeError:
            pass  # it is not there yet
        if returncode() is not None or time.monotonic() > deadline:
            raise SystemExit("aptserve up did not get ready")
        await asyncio.sleep(0.1)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
