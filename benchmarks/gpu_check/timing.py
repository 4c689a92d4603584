"""Seconds of a call on the device: medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from aptserve_worker.transfer import no_waiting

Call = Callable[[], object]

_TARGET_SECONDS = 0.2
"""Of all repeats of one call together."""
_FEWEST, _MOST = 5, 40
_CACHE_SIZES = 4
"""What is read between two calls, in sizes of the L2 cache."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call. ``how``: ``graph`` replayed, plain ``calls``, or by a host ``clock``."""

    median: float
    low: float
    high: float
    repeats: int
    how: str

    @classmethod
    def of(cls, seconds: list[float], how: str) -> Timing:
        """Summary of repeats."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), how)


class Timer(Protocol):
    """How long a call takes."""

    def __call__(self, call: Call) -> Timing: ...


class ClockTimer:
    """A plain clock, once: for runs whose times say nothing."""

    def __call__(self, call: Call) -> Timing:
        started = time.perf_counter()
        call()
        return Timing.of([time.perf_counter() - started], "clock")


class EventTimer:
    """CUDA events around calls that find nothing of their operands in the L2 cache.

    A call is recorded as a CUDA graph where it can be, as the worker does: times are of the device,
    not of the host that launches.
    """

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.zeros(_CACHE_SIZES * size // 4, device=device)
        # One for all: cuBLAS keeps a workspace for each stream that it has worked on.
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, call: Call) -> Timing:
        call()  # compiles
        torch.cuda.synchronize()
        run, how = self._recorded(call)
        run()
        first = self._measure(run, 1)[0]
        count = min(_MOST, max(_FEWEST, int(_TARGET_SECONDS / max(first, 1e-6))))
        return Timing.of(self._measure(run, count), how)

    def _measure(self, run: Call, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            self._other.sum()  # read, not written: what is written would go to memory later
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def _recorded(self, call: Call) -> tuple[Call, str]:
        """The call as a graph, or as it is where it waits for the device."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side), no_waiting():
                call()  # libraries take their workspaces before the recording
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # The outer stream is for a recording that fails: torch would go on with the inner one.
            with torch.cuda.stream(current), torch.cuda.graph(graph, stream=self._side):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return call, "calls"
        return graph.replay, "graph"
