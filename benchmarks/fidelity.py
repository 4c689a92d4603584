"""The simulator against the service: the same traces live and simulated, objective by objective.

The simulated worker is the live one's twin, read as ``aptserve simulate`` reads it. Its iterations
take what the scheduler's estimate said in the mean over the live run, and the idle time between
two of them. Planning and the way to the client take what single requests showed after the runs.
"Foretold" is the same from what was known before the run alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from aptserve.types import Calibration, TierSeconds, WorkerStatus
from aptserve_scheduler.core import Objectives
from aptserve_scheduler.sim import SimConfig, SimResult, SimWorker, simulate
from aptserve_scheduler.sim.calibration import load_worker

from benchmarks.common import describe_machine
from benchmarks.live_service import (
    PIPELINE_DEPTH,
    POLICIES,
    Load,
    Overheads,
    Played,
    interleaved,
    mean_speed,
    play_all,
    services,
    shares_of,
)

TIMES = (0.6, 1.2)
"""Rates over the one that keys and values alone have the memory for: moderate and too much."""
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
NUM_REQUESTS, QUICK_NUM_REQUESTS = 60, 30


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Live runs first, then their simulations, so that neither takes the other's processors."""
    load, overheads, played = asyncio.run(_play(quick=quick))
    runs = [_compare(run, load, overheads[run.case.policy], folder) for run in played]
    return {
        "machine": describe_machine(),
        "load": load.document(),
        "pipeline_depth": PIPELINE_DEPTH,
        "overheads": {policy: dataclasses.asdict(seen) for policy, seen in overheads.items()},
        "summary": summarise(runs),
        "runs": runs,
    }


async def _play(*, quick: bool) -> tuple[Load, dict[str, Overheads], list[Played]]:
    cases = interleaved(TIMES, QUICK_SEEDS if quick else SEEDS)
    async with services(POLICIES) as running:
        load, played = await play_all(running, cases, QUICK_NUM_REQUESTS if quick else NUM_REQUESTS)
        overheads = {
            policy: await service.measure_overheads() for policy, service in running.items()
        }
    return load, overheads, played


def _compare(played: Played, load: Load, overheads: Overheads, folder: Path) -> dict[str, Any]:
    before, after = played.before.workers[0], played.after.workers[0]
    believed = _twin(before, folder)
    true_speed = stretched(mean_speed(played.speeds), after.gap_share)
    simulated = _simulate(played, load, overheads, believed, _twin_at(before, true_speed, folder))
    known_speed = stretched(before.calibration, before.gap_share)
    foretold = _simulate(played, load, overheads, believed, _twin_at(before, known_speed, folder))
    return {
        **dataclasses.asdict(played.case),
        "live": {
            **played.shares,
            "duration_seconds": played.run.duration_seconds,
            "num_steps": played.num_steps,
            "num_preemptions": _gained(played, "num_preemptions"),
            "num_promotions": _gained(played, "num_promotions"),
            "num_failed": sum(not record.completed for record in played.run.records),
            "latest_send_seconds": max(played.run.send_delay_seconds),
        },
        "simulated": _outcome(simulated, overheads),
        "foretold": _outcome(foretold, overheads),
        "speed": dataclasses.asdict(true_speed, dict_factory=_plain),
    }


def _simulate(
    played: Played, load: Load, overheads: Overheads, believed: SimWorker, true: SimWorker
) -> SimResult:
    """``believed`` has what the scheduler knows at the start, ``true`` how long things take."""
    burst = load.standard
    return simulate(
        played.trace,
        SimConfig(
            policy=played.case.policy,
            workers=(SimWorker(believed.spec, true.cost),),
            objectives=Objectives(burst.ttft_seconds, burst.tbt_seconds),
            pipeline_depth=PIPELINE_DEPTH,
            planning_seconds=overheads.service_seconds,
            learns_costs=True,
        ),
    )


def _outcome(result: SimResult, overheads: Overheads) -> dict[str, float]:
    """As clients would have seen it: every token reaches them a little later."""
    seen = [
        record
        if record.ttft_seconds is None
        else dataclasses.replace(
            record, ttft_seconds=record.ttft_seconds + overheads.client_seconds
        )
        for record in result.records
    ]
    return {
        **shares_of(seen),
        "duration_seconds": result.duration_seconds,
        "num_steps": result.num_steps,
        "num_preemptions": result.num_preemptions,
        "num_promotions": result.num_promotions,
    }


def stretched(speed: Calibration, gap_share: float) -> Calibration:
    """With the idle time between iterations, ``gap_share`` of all, as part of each of them."""
    factor = 1 / (1 - gap_share)
    return Calibration(
        base_seconds=factor * speed.base_seconds,
        seconds_per_token=factor * speed.seconds_per_token,
        seconds_per_sequence=factor * speed.seconds_per_sequence,
        seconds_per_attention_pair=factor * speed.seconds_per_attention_pair,
        tiers=tuple(
            TierSeconds(tier.tier, factor * tier.seconds_per_cached_token) for tier in speed.tiers
        ),
    )


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Percentage points, simulated less live.

    ``cells``: means over the seeds of a policy and a rate. The rest is over all runs.
    """
    keys = sorted(
        {(run["policy"], run["times"]) for run in runs},
        key=lambda key: (POLICIES.index(key[0]), key[1]),
    )
    cells = []
    for policy, times in keys:
        of_cell = [run for run in runs if (run["policy"], run["times"]) == (policy, times)]
        cells.append(
            {
                "policy": policy,
                "times": times,
                "live": _mean(of_cell, "live"),
                "simulated": _mean(of_cell, "simulated"),
                "points": {
                    name: statistics.fmean(_points(run, "simulated", name) for run in of_cell)
                    for name in ("both", "ttft", "tbt")
                },
            }
        )
    return {
        "cells": cells,
        "worst_cell_points": max(abs(cell["points"]["both"]) for cell in cells),
        "simulated": _differences(runs, "simulated"),
        "foretold": _differences(runs, "foretold"),
    }


def _differences(runs: Sequence[dict[str, Any]], which: str) -> dict[str, dict[str, float]]:
    by_name = {
        name: [_points(run, which, name) for run in runs] for name in ("both", "ttft", "tbt")
    }
    return {
        name: {
            "mean_points": statistics.fmean(points),
            "mean_absolute_points": statistics.fmean(map(abs, points)),
            "worst_points": max(points, key=abs),
        }
        for name, points in by_name.items()
    }


def _points(run: dict[str, Any], which: str, name: str) -> float:
    return 100.0 * float(run[which][name] - run["live"][name])


def _mean(runs: Sequence[dict[str, Any]], which: str) -> dict[str, float]:
    return {
        name: statistics.fmean(run[which][name] for run in runs) for name in ("both", "ttft", "tbt")
    }


def _gained(played: Played, name: str) -> int:
    return int(getattr(played.after.totals, name) - getattr(played.before.totals, name))


def _twin_at(worker: WorkerStatus, speed: Calibration, folder: Path) -> SimWorker:
    return _twin(dataclasses.replace(worker, calibration=speed), folder)


def _twin(worker: WorkerStatus, folder: Path) -> SimWorker:
    """By way of the file that ``aptserve bench --json`` writes and the simulator reads."""
    path = folder / "worker.json"
    path.write_text(json.dumps({"workers": [dataclasses.asdict(worker, dict_factory=_plain)]}))
    return load_worker(path)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in items}
