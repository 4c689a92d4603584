"""The burst fits the machine, whatever its speed."""

import dataclasses

import numpy as np
import pytest
from aptserve.cli.demo.burst import Burst, plan_burst
from aptserve.cli.demo.warm_up import slowdown
from aptserve.types import Calibration, Tier, TierSeconds, TierStatus, WorkerStatus


def make_speed(factor: float = 1.0) -> Calibration:
    return Calibration(
        base_seconds=6e-3 * factor,
        seconds_per_token=1.3e-4 * factor,
        seconds_per_sequence=0.0,
        seconds_per_attention_pair=2e-7 * factor,
        tiers=(TierSeconds(Tier.KV, 2e-6 * factor), TierSeconds(Tier.HIDDEN, 4e-6 * factor)),
    )


def make_worker(num_units: int = 280, factor: float = 1.0) -> WorkerStatus:
    return WorkerStatus(
        worker_id="worker-0",
        device="cpu",
        num_units=num_units,
        num_used_units=0,
        block_size=16,
        unit_bytes=98304,
        tiers=(
            TierStatus(Tier.KV, 2, 0, 0, 2e-6 * factor, True),
            TierStatus(Tier.HIDDEN, 1, 0, 0, 4e-6 * factor, True),
        ),
        num_plans_in_flight=0,
        num_steps=0,
        gap_share=0.0,
        resident_bytes=0,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        calibration=make_speed(factor),
    )


def plan(worker: WorkerStatus, slower: float = 1.0, context: int = 1024, seed: int = 0) -> Burst:
    return plan_burst(worker, slower, context, seconds=20.0, seed=seed)


def test_equal_arguments_give_the_same_burst() -> None:
    one, same, other = (plan(make_worker(), seed=seed) for seed in (1, 1, 2))
    for name in ("arrival_seconds", "num_prompt_tokens", "num_output_tokens"):
        assert np.array_equal(getattr(one.trace, name), getattr(same.trace, name))
    assert not np.array_equal(one.trace.num_prompt_tokens, other.trace.num_prompt_tokens)


def test_it_asks_for_more_memory_than_there_is_and_not_for_more_arithmetic() -> None:
    worker, burst = make_worker(), plan(make_worker())
    trace = burst.trace
    tokens = trace.num_prompt_tokens + trace.num_output_tokens
    speed = worker.calibration
    arithmetic = speed.seconds_per_token * float(tokens.mean()) * burst.sustainable_rate
    assert arithmetic < 0.7  # of every second
    pool_tokens = worker.num_units / 2 * worker.block_size
    # By Little's law: tokens held = requests per second x tokens x seconds that each is there.
    answer_seconds = 2 * burst.ttft_seconds
    held = 1.1 * burst.sustainable_rate * float(tokens.mean()) * answer_seconds
    assert held > 0.9 * pool_tokens


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_slower_machine_gets_fewer_requests_and_longer_objectives(factor: float) -> None:
    usual, other = plan(make_worker()), plan(make_worker(factor=factor))
    assert other.sustainable_rate == pytest.approx(usual.sustainable_rate / factor)
    assert len(other.trace) == pytest.approx(min(len(usual.trace) / factor, 200), abs=1)
    assert other.ttft_seconds == pytest.approx(usual.ttft_seconds * factor, rel=0.1)
    assert other.tbt_seconds == pytest.approx(usual.tbt_seconds * factor, rel=0.1)


def test_what_clients_see_counts() -> None:
    seen = plan(make_worker(), slower=2.0)
    assert seen.sustainable_rate == plan(make_worker(factor=2.0)).sustainable_rate


@pytest.mark.parametrize(("num_units", "context"), [(280, 256), (20, 1024)])
def test_no_request_is_too_long_for_the_model_or_the_pool(num_units: int, context: int) -> None:
    trace = plan(make_worker(num_units), context=context).trace
    longest = int((trace.num_prompt_tokens + trace.num_output_tokens).max())
    assert longest <= min(context, num_units // 2 * 16)


@pytest.mark.parametrize(("factor", "count"), [(1e-3, 200), (1e3, 20)])
def test_extreme_machines(factor: float, count: int) -> None:
    burst = plan(make_worker(factor=factor))
    assert len(burst.trace) == count
    assert burst.num_long == round(0.15 * count)


def test_slowdown_is_what_the_clients_saw_over_what_the_worker_says() -> None:
    speed = make_speed()
    predicted = 24 * speed.base_seconds + 8 * (16 + 23) * speed.seconds_per_token
    assert slowdown(3 * predicted, speed) == pytest.approx(3.0)
    assert slowdown(0.5 * predicted, speed) == 1.0
    nothing = dataclasses.replace(speed, base_seconds=0.0, seconds_per_token=0.0)
    assert slowdown(1.0, nothing) > 1.0
