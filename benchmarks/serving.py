"""The whole system as processes: time to SERVING, resident memory, idle share of the worker."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from aptserve import AptServeError, AsyncClient

from benchmarks.common import describe_machine, make_prompts, save_opt_125m, spread

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 30.0
STREAMS = 8
TOKENS = 200
OFFLINE = (32, 128, 64)
"""Requests, prompt tokens, new tokens."""


async def _measure(folder: Path, rounds: int) -> dict[str, Any]:
    starts: list[float] = []
    scheduler_bytes: list[float] = []
    worker_bytes: list[float] = []
    idle: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for depth, shares in idle.items():
            async with _running("--pipeline-depth", str(depth)) as up:
                starts.append(up.start_seconds)
                await up.load()
                status = await up.client.status()
                shares.append(status.workers[0].gap_share)
                scheduler, worker = up.resident_bytes()
                scheduler_bytes.append(scheduler)
                worker_bytes.append(worker)
    return {
        "machine": describe_machine(),
        "seconds_to_serving": spread(starts),
        "scheduler_resident_mb": spread([b / 1e6 for b in scheduler_bytes]),
        "worker_resident_mb": spread([b / 1e6 for b in worker_bytes]),
        "load": f"{STREAMS} streams of {TOKENS} tokens, embedded model",
        "idle_share": {f"depth {depth}": spread(shares) for depth, shares in idle.items()},
        "offline_tokens_per_second": spread(await _offline(folder, rounds)),
    }


async def _offline(folder: Path, rounds: int) -> list[float]:
    """Requests of 128 + 64 tokens sent at once to a served OPT-125m shape."""
    requests, prompt_tokens, new_tokens = OFFLINE
    prompts = make_prompts(requests, prompt_tokens)
    rates = []
    async with _running("--model", str(save_opt_125m(folder)), "--pool-units", "2000") as up:
        for _ in range(rounds):
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(
                    up.client.complete(token_ids=p, max_tokens=new_tokens, ignore_eos=True)
                    for p in prompts
                )
            )
            assert all(len(a.token_ids) == new_tokens for a in answers)
            rates.append(requests * new_tokens / (time.perf_counter() - started))
    return rates


class _Up:
    """A running ``aptserve up``."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.client = AsyncClient(address)
        self.start_seconds = 0.0

    async def wait_serving(self, started: float) -> None:
        while True:
            try:
                status = await self.client.status()
                if status.accepting and status.workers:
                    break
            except AptServeError:
                pass
            if time.perf_counter() - started > START_TIMEOUT_SECONDS or self.process.returncode:
                raise SystemExit("aptserve up did not get ready")
            await asyncio.sleep(0.02)
        self.start_seconds = time.perf_counter() - started

    async def load(self) -> None:
        await asyncio.gather(
            *(
                self.client.complete(
                    prompt=f"def function_{i}(", max_tokens=TOKENS, ignore_eos=True
                )
                for i in range(STREAMS)
            )
        )

    def resident_bytes(self) -> tuple[int, int]:
        """Scheduler and worker."""
        by_kind = {"aptserve_scheduler": 0, "aptserve_worker": 0}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            command = " ".join(child.cmdline())
            for kind in by_kind:
                if kind in command:
                    by_kind[kind] += child.memory_info().rss
        scheduler, worker = by_kind.values()
        assert scheduler, "no scheduler process found"
        assert worker, "no worker process found"
        return scheduler, worker


@asynccontextmanager
async def _running(*flags: str) -> AsyncIterator[_Up]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aptserve.cli", "up", "--listen", address, *flags),
        stdout=subprocess.DEVNULL,
    )
    up = _Up(process, address)
    try:
        await up.wait_serving(started)
        yield up
    finally:
        await up.client.close()
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_SECONDS)


def measure(folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Everything, ``rounds`` times for each pipeline depth in turn."""
    return asyncio.run(_measure(folder, rounds))
