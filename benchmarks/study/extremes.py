"""The ends of the range: too much load, too little of anything to schedule, and the optimum."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from aptserve.evaluation import RunReport
from aptserve_scheduler.core import Objectives
from aptserve_scheduler.policies import policy_names
from aptserve_scheduler.sim.runs import CellSpec, run_cell

from benchmarks.study.cells import ABSORBED, KV_ONLY, cell
from benchmarks.study.runs import at_rates

PARTS = ("overload", "no_gain", "optimum", "long_run")
OVERLOADS = (1.5, 2.0)
HYBRID = ("apt", "apt-slo", "apt-slo:steady", "apt-slo:unbounded")
_AT_ONCE = 1000.0
"""Requests per second that nothing here can serve."""
_EQUAL_LENGTH = 256
Jobs = list[partial[list[RunReport]]]


def overload_jobs(num_requests: int, seeds: tuple[int, ...]) -> Jobs:
    """Every policy at 1.5 and 2 times what its system can sustain; the exact solver, whose
    decisions take too long for queues like that, is left out."""
    names = [name for name in policy_names() if name != "optimal"]
    specs = [
        cell("sharegpt", 1.0, name, ABSORBED if name in HYBRID else KV_ONLY, num_requests)
        for name in names
    ]
    return [partial(overloaded, spec, seeds[:3]) for spec in specs]


def overloaded(spec: CellSpec, seeds: tuple[int, ...]) -> list[RunReport]:
    """Runs at multiples of the sustainable rate: requests per second that the system completes
    when all arrive at once, under the policy itself."""
    sustainable = run_cell(spec, _AT_ONCE, seeds[0]).requests_per_second
    return at_rates(spec, [factor * sustainable for factor in OVERLOADS], seeds)


def no_gain_jobs(num_requests: int, seeds: tuple[int, ...]) -> Jobs:
    """Little load; short answers; requests that are all alike."""
    alike = Path(tempfile.gettempdir()) / "alike.csv"
    row = f"{_EQUAL_LENGTH},{_EQUAL_LENGTH}\n"
    alike.write_text("input_tokens,output_tokens\n" + row * num_requests)
    cases = [
        ("sharegpt", (0.3, 0.6), None),
        ("humaneval", (2.0, 4.0, 8.0), None),
        (str(alike), (1.0, 2.0, 3.0, 4.0), Objectives(1.0, 1.0)),
    ]
    pairs = [("fcfs", KV_ONLY), ("chunked", KV_ONLY), ("apt", ABSORBED), ("apt-slo", ABSORBED)]
    return [
        partial(
            at_rates, cell(source, 1.0, policy, system, num_requests, objectives), rates, seeds[:3]
        )
        for source, rates, objectives in cases
        for policy, system in pairs
    ]


def long_run_jobs(num_requests: int, seeds: tuple[int, ...]) -> Jobs:
    """Four times as many requests: what a run that soon ends would hide."""
    pairs = [(KV_ONLY, name) for name in ("fcfs", "chunked", "apt", "apt-slo", "apt-slo:steady")]
    pairs += [(ABSORBED, name) for name in ("apt", "apt-slo", "apt-slo:steady")]
    return [
        partial(
            at_rates,
            cell("sharegpt", 1.0, policy, system, 4 * num_requests),
            (1.7, 2.5),
            seeds[:2],
        )
        for system, policy in pairs
    ]


def optimum_jobs(num_requests: int, seeds: tuple[int, ...]) -> Jobs:
    """The paper's problem solved exactly in every iteration, on few requests: it is slow."""
    few = min(num_requests, 120)
    return [
        partial(at_rates, cell("sharegpt", 1.0, policy, ABSORBED, few), (2.5, 3.75), seeds[:2])
        for policy in ("apt", "optimal")
    ]
