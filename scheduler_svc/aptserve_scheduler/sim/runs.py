"""One simulated run: what is played to which machine, and the report of it.

A seed draws a workload's lengths and arrivals once, and a rate only scales the arrivals, so that
all policies, systems and rates are compared on the same requests.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aptserve.evaluation import Cell, PoolTimeline, RunReport, report_of
from aptserve.workload import Trace, load_workload, workload_names

from aptserve_scheduler.core import Objectives
from aptserve_scheduler.sim.engine import SimConfig, SimResult, simulate
from aptserve_scheduler.sim.worker import SimWorker

_PAPER_OBJECTIVES = {
    ("sharegpt", "opt-13b"): Objectives(1.0, 1.0),
    ("sharegpt", "opt-30b"): Objectives(1.5, 1.0),
    ("sharegpt", "opt-66b"): Objectives(2.0, 1.0),
    ("humaneval", "opt-13b"): Objectives(0.5, 0.5),
    ("humaneval", "opt-30b"): Objectives(1.0, 0.5),
    ("humaneval", "opt-66b"): Objectives(1.5, 0.5),
    ("longbench", "opt-13b"): Objectives(4.0, 1.0),
    ("longbench", "opt-30b"): Objectives(4.5, 1.0),
    ("longbench", "opt-66b"): Objectives(5.0, 1.0),
}
_DEFAULT_OBJECTIVES = Objectives(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class CellSpec:
    """What to simulate, but for rate and seed. Everything in it can be pickled."""

    source: str
    """Name of a workload or path of a trace, as :func:`load_workload` takes it."""
    cv: float | None
    """``None``: the trace's own arrivals."""
    policy: str
    workers: tuple[SimWorker, ...]
    system: str
    """What reports call the workers."""
    objectives: Objectives
    num_requests: int | None = None
    max_total_tokens: int | None = None
    max_tokens: int | None = None
    """Most output tokens that requests allow themselves, as of :class:`SimConfig`: with ``None``
    policies know each length beforehand."""
    pipeline_depth: int = 1
    planning_seconds: float = 0.0
    keeps_timeline: bool = False
    """Whether one run, the first seed's at the middle rate of the grid, keeps its timeline."""

    def cell(self) -> Cell:
        """How reports know it."""
        is_name = self.source in workload_names()
        return Cell(
            workload=self.source if is_name else Path(self.source).stem,
            system=self.system,
            cv=self.cv,
            policy=self.policy,
            ttft_objective_seconds=self.objectives.ttft_seconds,
            tbt_objective_seconds=self.objectives.tbt_seconds,
        )


def paper_objectives(workload: str, model: str) -> Objectives:
    """The objectives of the paper's evaluation (Gao et al., SIGMOD 2025).

    For its three workloads; of a model that it does not have, OPT-13B's. 1 s each for all else.
    """
    of_model = _PAPER_OBJECTIVES.get((workload, model))
    return of_model or _PAPER_OBJECTIVES.get((workload, "opt-13b"), _DEFAULT_OBJECTIVES)


def largest_request(workers: tuple[SimWorker, ...]) -> int:
    """Tokens of the longest request that every worker can hold with keys and values."""
    return min(
        worker.spec.num_units // worker.spec.tiers[0].units_per_block * worker.spec.block_size
        for worker in workers
    )


def load_trace(spec: CellSpec, rate: float | None, seed: int) -> Trace:
    """The requests of one run. ValueError names the argument of :func:`load_workload` at fault."""
    arguments = (spec.source, spec.cv, seed, spec.num_requests, spec.max_total_tokens)
    if rate is None:
        trace = _drawn(*arguments, rate=None)
        if spec.cv is not None:
            raise ValueError(f"rate: is needed to draw arrivals of CV {spec.cv:g}")
        return trace
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: must be above 0 and finite, not {rate:g}")
    trace = _drawn(*arguments, rate=1.0)
    return dataclasses.replace(
        trace,
        arrival_seconds=trace.arrival_seconds / rate,
        note=f"{trace.note}; played at {rate:.4g}/s",
    )


def run_cell(
    spec: CellSpec, rate: float | None, seed: int, *, keep_timeline: bool = False
) -> RunReport:
    """Simulate one run and sum it up."""
    trace = load_trace(spec, rate, seed)
    result = simulate(
        trace,
        SimConfig(
            policy=spec.policy,
            workers=spec.workers,
            objectives=spec.objectives,
            max_tokens=spec.max_tokens,
            pipeline_depth=spec.pipeline_depth,
            planning_seconds=spec.planning_seconds,
        ),
    )
    return report_of(
        spec.cell(),
        result.records,
        rate=rate,
        seed=seed,
        duration_seconds=result.duration_seconds,
        num_promotions=result.num_promotions,
        num_steps=result.num_steps,
        timeline=_pool_timeline(result),
        keep_timeline=keep_timeline,
        note=trace.note,
    )


@lru_cache(maxsize=64)
def _drawn(
    source: str,
    cv: float | None,
    seed: int,
    num_requests: int | None,
    max_total_tokens: int | None,
    *,
    rate: float | None,
) -> Trace:
    return load_workload(
        source,
        num_requests=num_requests,
        seed=seed,
        max_total_tokens=max_total_tokens,
        rate=rate,
        cv=None if rate is None else cv,
    )


def _pool_timeline(result: SimResult) -> PoolTimeline:
    timeline = result.timeline
    return PoolTimeline(
        seconds=tuple(timeline.seconds.tolist()),
        num_waiting=tuple(timeline.num_waiting.tolist()),
        num_running=tuple(timeline.num_running.tolist()),
        num_units=timeline.num_units,
        used_units={tier: tuple(used.tolist()) for tier, used in timeline.used_units.items()},
    )
