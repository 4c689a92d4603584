"""What ``mlfq`` and ``srtf`` say about their next decodes, against those that they then decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import BatchProblem, Decision, Policy
from aptserve_scheduler.policies.base import Arrival, Service
from aptserve_scheduler.policies.mlfq import MlfqConfig, MlfqPolicy
from aptserve_scheduler.policies.srtf import SrtfConfig, SrtfPolicy
from support.problems import ProblemBuilder, Row

WORLD = ProblemBuilder(
    block_size=4,
    max_num_batched_tokens=400,
    cost=CostCoefficients(4e-3, 1e-3, 0.0, 0.0, {Tier.KV: 1e-4}),
)
POLICIES: dict[str, Callable[[], Policy]] = {
    "mlfq": lambda: MlfqPolicy(MlfqConfig(starving_seconds=0.1)),
    "mlfq of few queues": lambda: MlfqPolicy(MlfqConfig(num_queues=4, starving_seconds=0.1)),
    "srtf": lambda: SrtfPolicy(SrtfConfig(quantum_seconds=0.02, ageing_seconds=0.1)),
    "srtf:oracle": lambda: SrtfPolicy(
        SrtfConfig("oracle", quantum_seconds=0.02, ageing_seconds=0.1)
    ),
    "srtf:noisy": lambda: SrtfPolicy(SrtfConfig("noisy", quantum_seconds=0.02, num_levels=4)),
}


def decode(rng: random.Random) -> Row:
    """A running request with a token received just now."""
    num_output = rng.randint(1, 60)
    num_tokens = num_output + rng.randint(4, 20)
    return Row(
        num_tokens - 1,
        num_tokens,
        pending_seconds=0.0,
        age_seconds=rng.uniform(0.0, 0.5),
        num_output_tokens=num_output,
        max_num_tokens=num_tokens + rng.choice((20, 100)),
        expected_output_tokens=rng.choice((0, 30, 62, 70, 150)),
        priority=rng.choice((0, 0, -1, 2)),
    )


def prompt(rng: random.Random) -> Row:
    """A waiting request; some have lost their memory after some output."""
    num_output = rng.choice((0, 0, 20))
    num_tokens = num_output + rng.randint(20, 120)
    age = rng.uniform(0.0, 0.5)
    return Row(
        0,
        num_tokens,
        pending_seconds=age,
        age_seconds=age,
        num_output_tokens=num_output,
        max_num_tokens=num_tokens + 100,
        expected_output_tokens=rng.choice((0, 30, 120)),
        priority=rng.choice((0, 0, -1, 1)),
    )


def remember(policy: Policy, rows: list[Row], rng: random.Random) -> None:
    """Answers of the past, then the arrival and the service so far of these."""
    for _ in range(12):
        policy.arrived(Arrival(0, 0.0, "", 0, rng.randint(4, 20), 0, 100, None))
        policy.ended(0, rng.choice((10, 61, 64, 130)), completed=True)
    for slot in range(len(rows)):
        policy.arrived(Arrival(slot, 0.0, "", 0, 8, 0, 100, None))
    # Whoever was not seen before joins a queue.
    policy.decide(WORLD.build([], [replace(row, num_computed=0) for row in rows]))
    for slot in range(len(rows)):
        serve(policy, [slot], rng.choice((0.0, 0.02, 0.06, 0.2)), rng.uniform(0.9, 1.0))


def serve(policy: Policy, slots: list[int], seconds: float, now: float) -> None:
    one = np.ones(len(slots), np.int64)
    policy.served(Service(np.array(slots), one, one, seconds, now))


def after(rows: list[Row], seconds: float, num_tokens: int) -> list[Row]:
    """The same requests a while later, with so many tokens more."""
    return [
        replace(
            row,
            num_computed=row.num_computed + num_tokens,
            num_tokens=row.num_tokens + num_tokens,
            num_output_tokens=row.num_output_tokens + num_tokens,
            pending_seconds=0.0 if num_tokens else row.pending_seconds + seconds,
            age_seconds=row.age_seconds + seconds,
        )
        for row in rows
    ]


def is_decode_of_all(problem: BatchProblem, decision: Decision | None) -> bool:
    return (
        decision is not None
        and not len(decision.preempted)
        and sorted(decision.slots.tolist()) == problem.running.slots.tolist()
    )


def in_arrival_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.age_seconds)


def decodes_promised(name: str, seed: int) -> int:
    """Iterations for which a random decode was said to hold, each of which is decided for."""
    rng = random.Random(seed)
    running = in_arrival_order([decode(rng) for _ in range(rng.randint(2, 8))])
    waiting = in_arrival_order([prompt(rng) for _ in range(rng.randint(1, 6))])
    policy = POLICIES[name]()
    remember(policy, [*running, *waiting], rng)
    num_units = sum(2 * -(-row.num_tokens // 4) for row in running) + rng.randint(0, 30)
    max_num_seqs = rng.choice((len(running), 8))
    world = replace(WORLD, num_units=num_units, max_num_seqs=max_num_seqs)
    problem = world.build(running, waiting)
    decision = policy.decide(problem)
    if decision is None or not is_decode_of_all(problem, decision):
        return 0
    horizon = policy.horizon(problem, decision)
    slots, num_promised = problem.running.slots.tolist(), 0
    later = deepcopy(policy)
    while num_promised < horizon.num_iterations:
        num_promised += 1
        seconds = rng.choice((1e-4, 1e-3, 0.003, 0.01))
        world = replace(world, now=world.now + seconds)
        serve(later, slots, seconds, world.now)
        running, waiting = after(running, seconds, 1), after(waiting, seconds, 0)
        problem = world.build(running, waiting)
        num_grown = sum(2 * (row.num_computed % 4 == 0) for row in running)
        if world.now >= horizon.until or problem.num_free_units < num_grown:
            break
        if num_promised < horizon.num_iterations:
            assert is_decode_of_all(problem, later.decide(problem))
    return num_promised


@pytest.mark.parametrize("name", POLICIES)
def test_they_decide_as_they_said(name: str) -> None:
    promised = [decodes_promised(name, seed) for seed in range(2000)]
    assert sum(num == 1 for num in promised) > 10
    assert sum(num > 2 for num in promised) > 50
