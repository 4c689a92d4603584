"""Policies on a real CPU worker that is short of memory: attainment by rate, and goodput."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aptserve.evaluation.goodput import Bound, crossing
from aptserve.evaluation.intervals import estimate, half_width

from benchmarks.common import describe_machine
from benchmarks.live_service import Load, Played, interleaved, play_all, services

POLICIES = ("fcfs", "apt", "apt-slo")
TARGET = 0.9
TIMES, QUICK_TIMES = (0.3, 0.6, 1.0, 1.8), (0.5, 1.5)
"""Rates over the one that keys and values alone have the memory for."""
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
NUM_REQUESTS, QUICK_NUM_REQUESTS = 60, 30


def measure(_folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Every policy at every rate with every seed, in turns."""
    load, played = asyncio.run(_play(quick=quick))
    runs = [_run(run, load) for run in played]
    return {
        "machine": describe_machine(),
        "load": load.document(),
        "target": TARGET,
        "policies": compare(runs),
        "runs": runs,
    }


async def _play(*, quick: bool) -> tuple[Load, list[Played]]:
    times, seeds = (QUICK_TIMES, QUICK_SEEDS) if quick else (TIMES, SEEDS)
    cases = interleaved(times, seeds, POLICIES)
    async with services(POLICIES) as running:
        return await play_all(running, cases, QUICK_NUM_REQUESTS if quick else NUM_REQUESTS)


def _run(played: Played, load: Load) -> dict[str, Any]:
    records = played.run.records
    return {
        **dataclasses.asdict(played.case),
        "requests_per_second": played.case.times * load.standard.sustainable_rate,
        **played.shares,
        "duration_seconds": played.run.duration_seconds,
        "longest_wait_seconds": max(record.longest_wait_seconds for record in records),
        "num_failed": sum(not record.completed for record in records),
        "num_steps": played.num_steps,
        "latest_send_seconds": max(played.run.send_delay_seconds),
    }


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By policy: attainment at each rate, goodput, and its ratio to that of fcfs.

    Goodput is where the mean attainment over seeds, linear between rates, falls under the target;
    ``bound`` says whether it lies beyond the rates tried. A ratio is a lower bound where the
    policy's goodput is one or that of fcfs lies below all rates. Intervals are those of 95 % by the
    spread over seeds, where each seed has a crossing of its own.
    """
    by_seed = {
        policy: _by_seed(runs, policy) for policy in dict.fromkeys(r["policy"] for r in runs)
    }
    found = {policy: _goodput(_means(seeds)) for policy, seeds in by_seed.items()}
    base_rate, base_bound = found["fcfs"]
    result = {}
    for policy, (rate, bound) in found.items():
        seeds = by_seed[policy]
        ratios = _ratios(seeds, by_seed["fcfs"])
        is_base = policy == "fcfs"
        is_known = is_base or (bound is not Bound.BELOW and base_bound is not Bound.AT_LEAST)
        is_floor = bound is Bound.AT_LEAST or base_bound is Bound.BELOW
        result[policy] = {
            "attainment": [
                {"requests_per_second": at, **_estimate([shares[at] for shares in seeds])}
                for at in sorted(seeds[0])
            ],
            "goodput_requests_per_second": rate,
            "bound": bound.value,
            "half_width": _half_width([crossing(shares, TARGET) for shares in seeds]),
            "ratio_to_fcfs": rate / base_rate if is_known else None,
            "ratio_is_at_least": is_known and is_floor and not is_base,
            "ratio_half_width": _half_width(ratios),
        }
    return result


def _by_seed(runs: Sequence[dict[str, Any]], policy: str) -> list[dict[float, float]]:
    """For each seed the attainment by rate."""
    seeds: dict[int, dict[float, float]] = {}
    for run in runs:
        if run["policy"] == policy:
            seeds.setdefault(run["seed"], {})[run["requests_per_second"]] = run["both"]
    return list(seeds.values())


def _means(seeds: Sequence[Mapping[float, float]]) -> dict[float, float]:
    return {rate: statistics.fmean(shares[rate] for shares in seeds) for rate in seeds[0]}


def _goodput(attainment: Mapping[float, float]) -> tuple[float, Bound]:
    rate = crossing(attainment, TARGET)
    if rate is not None:
        return rate, Bound.FOUND
    if attainment[min(attainment)] < TARGET:
        return min(attainment), Bound.BELOW
    return max(attainment), Bound.AT_LEAST


def _ratios(
    seeds: Sequence[Mapping[float, float]], base: Sequence[Mapping[float, float]]
) -> list[float | None]:
    """Each seed's own; ``None`` where one of the two does not cross the target."""
    pairs = [(crossing(s, TARGET), crossing(b, TARGET)) for s, b in zip(seeds, base, strict=True)]
    return [None if own is None or other is None else own / other for own, other in pairs]


def _half_width(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return half_width(known) if len(known) == len(values) else None


def _estimate(shares: Sequence[float]) -> dict[str, float | None]:
    found = estimate(shares)
    return {"mean": found.mean, "half_width": found.half_width}
