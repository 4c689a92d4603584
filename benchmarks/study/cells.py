"""What the study compares: workloads, systems and policies, by the paper's objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from aptserve_scheduler.core import Objectives
from aptserve_scheduler.sim import SimWorker
from aptserve_scheduler.sim.cost import make_worker
from aptserve_scheduler.sim.runs import CellSpec, paper_objectives

MODEL, GPU = "opt-13b", "a100-40g"
MAX_TOTAL_TOKENS = 2048
"""Of the paper's workloads, and OPT's context."""

KV_ONLY, REPROJECTED, ABSORBED = "KV only", "KV + hidden re-projected", "KV + hidden absorbed"
SYSTEMS = (KV_ONLY, REPROJECTED, ABSORBED)
CVS = (1.0, 5.0, 10.0)
KV_POLICIES = ("fcfs", "chunked", "qos", "qos:eager")
"""They use keys and values alone whatever tiers there are, so they are run without others."""
HYBRID_POLICIES = ("apt", "apt-slo")


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload with the rates to look at, in requests per second, ascending."""

    name: str
    rates: tuple[float, ...]
    start: int
    """Number of the rate to begin with."""


WORKLOADS = (
    Workload("sharegpt", (0.1, 0.2, 0.3, 0.5, 0.75, 1.1, 1.7, 2.5, 3.75, 5.6, 8.4), 6),
    Workload("humaneval", (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 13.5, 20.0, 30.0, 45.0), 4),
    Workload("longbench", (0.05, 0.1, 0.2, 0.35, 0.55, 0.85, 1.3, 2.0, 3.0), 4),
)


@lru_cache
def worker_of(system: str) -> SimWorker:
    """The simulated GPU."""
    if system == KV_ONLY:
        return make_worker(MODEL, GPU, tiers=("kv",))
    form = "reprojected" if system == REPROJECTED else "absorbed"
    return make_worker(MODEL, GPU, tiers=("kv", "hidden"), hidden_attention=form)


def cell(
    source: str,
    cv: float | None,
    policy: str,
    system: str,
    num_requests: int,
    objectives: Objectives | None = None,
) -> CellSpec:
    """One case. Nobody knows an answer's length beforehand: requests allow the whole context."""
    return CellSpec(
        source=source,
        cv=cv,
        policy=policy,
        workers=(worker_of(system),),
        system=system,
        objectives=objectives or paper_objectives(source, MODEL),
        num_requests=num_requests,
        max_total_tokens=MAX_TOTAL_TOKENS,
        max_tokens=MAX_TOTAL_TOKENS,
    )


def factorial(workload: Workload, num_requests: int) -> list[CellSpec]:
    """Systems x policies x burstiness of one workload."""
    pairs = [(KV_ONLY, policy) for policy in KV_POLICIES]
    pairs += [(system, policy) for system in SYSTEMS for policy in HYBRID_POLICIES]
    return [
        replace(
            cell(workload.name, cv, policy, system, num_requests),
            keeps_timeline=(cv, workload.name) == (5.0, "sharegpt") and policy != "qos",
        )
        for cv in CVS
        for system, policy in pairs
    ]
