"""The simulator against what can be worked out by hand, and against itself without short cuts."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from aptserve.workload import Trace
from aptserve_scheduler.core import (
    CostCoefficients,
    DecodeTurns,
    Objectives,
    Scheduler,
    Tier,
    WorkerId,
)
from aptserve_scheduler.policies import policy_names
from aptserve_scheduler.sim import SimConfig, SimResult, SimWorker, simulate
from aptserve_scheduler.sim.worker import Amount
from support.scheduler import make_cost, make_worker

Ints = npt.NDArray[np.int64]


class HandyCost:
    """0.25 s for an iteration and 1/64 s more for each token computed; exact in binary."""

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: npt.NDArray[np.int8]) -> float:
        return 0.25 + int(num_new.sum()) / 64

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        return 0.25 + sum(num_sequences) / 64


def make_trace(arrivals: list[float], prompts: list[int], outputs: list[int]) -> Trace:
    num = len(arrivals)
    return Trace(
        name="made",
        arrival_seconds=np.array(arrivals, np.float64),
        num_prompt_tokens=np.array(prompts, np.int64),
        num_output_tokens=np.array(outputs, np.int64),
        tenants=("",) * num,
        priorities=np.zeros(num, np.int64),
        note="",
    )


def random_trace(seed: int, num: int = 40) -> Trace:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.integers(0, 12, num)) / 4.0
    prompts, outputs = rng.integers(1, 60, num), rng.integers(1, 40, num)
    return make_trace((arrivals - arrivals[0]).tolist(), prompts.tolist(), outputs.tolist())


def play(
    trace: Trace, *, num_workers: int = 1, cost: CostCoefficients | None = None, **changes: object
) -> SimResult:
    specs = [make_worker(f"w{i}", cost=cost or make_cost()) for i in range(num_workers)]
    workers = tuple(SimWorker(spec, HandyCost()) for spec in specs)
    config = SimConfig(policy="fcfs", workers=workers, objectives=Objectives(1.0, 1.0))
    return simulate(trace, replace(config, **changes))  # type: ignore[arg-type]


# The solver that "optimal" asks makes cycles of its own.
@pytest.mark.parametrize("policy", [name for name in policy_names() if name != "optimal"])
def test_what_a_decision_was_made_of_ends_with_it(policy: str) -> None:
    """Arrays in a cycle would live on until they are collected, and fill the processor's caches."""
    trace = random_trace(7)
    play(trace, policy=policy)
    gc.collect()
    gc.disable()
    try:
        play(trace, policy=policy)
        num_unreachable = gc.collect()
    finally:
        gc.enable()
    assert num_unreachable == 0


def test_one_request_takes_its_prefill_and_its_decodes() -> None:
    result = play(make_trace([0.0], [16], [3]))
    (record,) = result.records
    assert record.ttft_seconds == 0.5
    assert record.tbt_p99_seconds == 0.25 + 1 / 64
    assert record.total_seconds == result.duration_seconds == 0.5 + 2 * (0.25 + 1 / 64)
    assert (record.num_output_tokens, result.num_steps, record.is_good) == (3, 3, True)


def test_a_request_waits_for_the_iteration_under_way() -> None:
    result = play(make_trace([0.0, 0.125], [16, 16], [1, 1]))
    assert [record.ttft_seconds for record in result.records] == [0.5, 0.5 - 0.125 + 0.5]


def test_planning_costs_time_only_where_nothing_is_planned_ahead() -> None:
    trace = make_trace([0.0], [16], [9])
    plain = play(trace).duration_seconds
    late = play(trace, planning_seconds=0.125)
    assert late.duration_seconds == plain + 9 * 0.125
    ahead = play(trace, planning_seconds=0.125, pipeline_depth=2)
    assert ahead.duration_seconds == plain + 0.125


def test_a_request_that_no_pool_can_hold_is_a_miss() -> None:
    result = play(make_trace([0.0, 0.0], [500, 4], [1, 1]))
    refused, served = result.records
    assert not refused.is_good
    assert refused.error is not None
    assert "tokens together" in refused.error
    assert served.is_good


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_ends_with_what_it_asked_for(
    policy: str, num_workers: int, depth: int
) -> None:
    trace = random_trace(depth)
    result = play(trace, num_workers=num_workers, policy=policy, pipeline_depth=depth)
    assert [int(record.request_id) for record in result.records] == list(range(len(trace)))
    produced = [record.num_output_tokens for record in result.records]
    assert produced == trace.num_output_tokens.tolist()
    assert result.timeline.seconds[-1] == result.duration_seconds
    used = sum(result.timeline.used_units.values())
    assert int(np.max(used)) <= result.timeline.num_units


@pytest.mark.parametrize("policy", policy_names())
def test_skipping_ahead_changes_nothing(policy: str) -> None:
    trace = random_trace(7)
    # A planning time too short to show in any sum takes the way without short cuts.
    step_by_step = play(trace, policy=policy, planning_seconds=1e-300)
    assert play(trace, policy=policy).records == step_by_step.records


def test_taking_turns_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden requests sit out again and again on a worker that is believed to be slow with them."""
    num_uneven = 0
    enter = Scheduler.enter_turns

    def counting(self: Scheduler, worker_id: WorkerId, turns: DecodeTurns, now: float) -> None:
        nonlocal num_uneven
        num_uneven += sum(len(entries) < len(turns.slots) for entries in turns.entries)
        enter(self, worker_id, turns, now)

    monkeypatch.setattr(Scheduler, "enter_turns", counting)
    slow_hidden = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 5e-3})
    trace = random_trace(7, num=80)
    settings = {"policy": "apt", "cost": slow_hidden, "max_tokens": 45}
    step_by_step = play(trace, planning_seconds=1e-300, **settings)
    assert num_uneven == 0
    in_turns = play(trace, **settings)
    assert num_uneven > 0
    assert in_turns.records == step_by_step.records
    assert in_turns.num_steps == step_by_step.num_steps


def test_lengths_may_be_hidden_from_the_scheduler() -> None:
    trace = random_trace(3)
    open_ended = play(trace, max_tokens=45)
    produced = [record.num_output_tokens for record in open_ended.records]
    assert produced == trace.num_output_tokens.tolist()


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    trace = random_trace(1)
    workers = (SimWorker(make_worker(), HandyCost()),)
    config = SimConfig(policy="fcfs", workers=workers, objectives=Objectives(1.0, 1.0))
    simulate(trace, config, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(trace), len(trace))
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"workers": ()}, "workers"),
        ({"planning_seconds": -1.0}, "planning_seconds"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_settings_name_their_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        play(make_trace([0.0], [1], [1]), **changes)
