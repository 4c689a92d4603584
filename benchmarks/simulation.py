"""How much faster than real time the simulator is, one process at a time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from aptserve.workload import load_workload
from aptserve_scheduler.core import Objectives
from aptserve_scheduler.policies import policy_names
from aptserve_scheduler.sim import SimConfig, simulate
from aptserve_scheduler.sim.cost import make_worker

from benchmarks.common import describe_machine, spread

POLICIES = tuple(name for name in policy_names() if ":" not in name and name != "optimal")
"""All but variants; ``optimal`` is not made for speed."""
RATES = (0.5, 1.1, 2.5)
"""Requests per second: little load, what baselines sustain, and more than anybody sustains."""
NUM_REQUESTS, NUM_REPEATS = 1000, 3


def measure() -> dict[str, Any]:
    """Simulated seconds per second, of ShareGPT lengths on OPT-13B and an A100 with 40 GB."""
    worker = make_worker("opt-13b", "a100-40g", tiers=("kv", "hidden"), hidden_attention="absorbed")
    rows = []
    for rate in RATES:
        for policy in POLICIES:
            config = SimConfig(policy, (worker,), Objectives(1.0, 1.0), max_tokens=2048)
            speeds, micros = [], []
            for seed in range(NUM_REPEATS):
                trace = load_workload(
                    "sharegpt",
                    num_requests=NUM_REQUESTS,
                    seed=seed,
                    max_total_tokens=2048,
                    rate=rate,
                    cv=1.0,
                )
                started = time.perf_counter()
                result = simulate(trace, config)
                seconds = time.perf_counter() - started
                speeds.append(result.duration_seconds / seconds)
                micros.append(seconds / result.num_steps * 1e6)
            rows.append(
                {
                    "policy": policy,
                    "rate": rate,
                    "simulated_seconds_per_second": spread(speeds),
                    "microseconds_per_iteration": float(np.median(micros)),
                }
            )
    return {"machine": describe_machine(), "num_requests": NUM_REQUESTS, "simulation": rows}
