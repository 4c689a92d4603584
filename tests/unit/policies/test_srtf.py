"""Shortest remaining time first: its three predictors, levels and ageing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import create_policy
from aptserve_scheduler.policies.base import Arrival
from aptserve_scheduler.policies.srtf import SrtfConfig, SrtfPolicy
from support.problems import Row, make_problem
from support.scheduler import expected_tokens, make_request, make_rig, run_until_idle

TEN_MS_PER_ITERATION = CostCoefficients(0.01, 0.0, 0.0, 0.0, {Tier.KV: 0.0})
ORACLE = SrtfConfig("oracle")


def order(
    policy: SrtfPolicy, running: list[Row], waiting: list[Row] | None = None, **changes: object
) -> list[int]:
    """Slots in batch order when there is room for all."""
    fields = {"num_units": 10_000, "max_num_batched_tokens": 1000, "cost": TEN_MS_PER_ITERATION}
    decision = policy.decide(make_problem(running, waiting, **{**fields, **changes}))
    assert decision is not None
    return decision.slots.tolist()


def decoding(expected: int, produced: int = 1, most: int = 4000, **changes: object) -> Row:
    """A running request with a prompt of 4 tokens and a guess of its output."""
    return Row(
        num_computed=3 + produced,
        num_tokens=4 + produced,
        num_output_tokens=produced,
        max_num_tokens=4 + most,
        expected_output_tokens=expected,
        **changes,  # type: ignore[arg-type]
    )


def arrive(policy: SrtfPolicy, *slots: int, num_prompt: int = 4) -> None:
    for slot in slots:
        policy.arrived(Arrival(slot, 0.0, "", 0, num_prompt, 0, 4000, None))


def test_the_shortest_remaining_goes_first() -> None:
    # 10 ms each: 0.25 s are 25 tokens, the top level
    rows = [decoding(401), decoding(26), decoding(101), decoding(401, produced=380)]
    assert order(SrtfPolicy(ORACLE), rows) == [1, 3, 2, 0]


def test_a_level_doubles_and_is_ordered_by_arrival() -> None:
    config = SrtfConfig("oracle", quantum_seconds=0.1)
    assert order(SrtfPolicy(config), [decoding(n) for n in (22, 21, 12, 11)]) == [3, 1, 2, 0]


def test_computing_what_is_left_counts_as_remaining() -> None:
    cost = CostCoefficients(0.01, 0.001, 0.0, 0.0, {Tier.KV: 0.0})
    running = decoding(41)  # 40 tokens of 11 ms
    lost = Row(
        num_computed=0,
        num_tokens=605,
        num_output_tokens=21,
        max_num_tokens=9000,
        expected_output_tokens=31,  # 10 tokens of 11 ms
        age_seconds=2.0,
    )
    assert order(SrtfPolicy(ORACLE), [running], [lost], cost=cost) == [0, 1]
    short = replace(lost, num_tokens=25)
    assert order(SrtfPolicy(ORACLE), [running], [short], cost=cost) == [1, 0]


def test_time_since_arrival_lifts_by_levels() -> None:
    config = SrtfConfig("oracle", ageing_seconds=10.0)
    rows = [decoding(400, age_seconds=41.0), decoding(10, age_seconds=5.0)]  # levels 4 and 0
    assert order(SrtfPolicy(config), rows) == [0, 1]
    rows[0] = decoding(400, age_seconds=39.0)
    assert order(SrtfPolicy(config), rows) == [1, 0]


def test_even_the_longest_is_in_the_lowest_level_after_its_bound() -> None:
    config = SrtfConfig("oracle", num_levels=5, ageing_seconds=1.0)
    old = decoding(10**6, most=10**6, age_seconds=4.0)
    assert order(SrtfPolicy(config), [decoding(2, age_seconds=3.9), old]) == [1, 0]


def test_a_priority_counts_like_a_level() -> None:
    rows = [decoding(50), decoding(150, priority=3), decoding(20, priority=-4)]
    assert order(SrtfPolicy(ORACLE), rows) == [1, 0, 2]


def test_memory_goes_to_the_shorter() -> None:
    waiting = Row(0, 20, max_num_tokens=29, expected_output_tokens=2)
    problem = make_problem(
        [decoding(400), decoding(300)], [waiting], num_units=49, max_num_batched_tokens=32
    )
    decision = SrtfPolicy(ORACLE).decide(problem)
    assert decision is not None
    assert decision.slots.tolist() == [2]
    assert decision.preempted.tolist() == [0, 1]
    decision = SrtfPolicy(ORACLE).decide(replace(problem, num_units=50))
    assert decision is not None
    assert decision.slots.tolist() == [2, 0]
    assert decision.preempted.tolist() == [1]


def test_without_a_guess_an_oracle_expects_the_most() -> None:
    assert order(SrtfPolicy(ORACLE), [decoding(0), decoding(3000)]) == [1, 0]
    assert order(SrtfPolicy(ORACLE), [decoding(0, most=20), decoding(300)]) == [0, 1]


def test_an_outlived_guess_is_one_token() -> None:
    assert order(SrtfPolicy(ORACLE), [decoding(300), decoding(20, produced=50)]) == [1, 0]


def test_noise_is_of_each_request_and_repeatable() -> None:
    def noisy(seed: int) -> SrtfPolicy:
        policy = SrtfPolicy(SrtfConfig("noisy", sigma=2.0, seed=seed))
        arrive(policy, *range(20))
        return policy

    rows = [decoding(100) for _ in range(20)]
    fields = {"max_num_seqs": 20}
    first, again, other = noisy(1), noisy(1), noisy(2)
    assert order(first, rows, **fields) == order(first, rows, **fields)
    assert order(first, rows, **fields) == order(again, rows, **fields) != list(range(20))
    assert order(other, rows, **fields) != order(first, rows, **fields)
    exact = SrtfPolicy(SrtfConfig("noisy", sigma=0.0))
    arrive(exact, *range(20))
    assert order(exact, rows, **fields) == list(range(20))


def test_noise_has_the_stated_spread() -> None:
    policy = SrtfPolicy(SrtfConfig("noisy", sigma=0.5))
    arrive(policy, *range(4000))
    logs = policy._log_factor[:4000]
    assert np.mean(logs) == pytest.approx(0.0, abs=0.03)
    assert np.std(logs) == pytest.approx(0.5, abs=0.03)


def test_without_history_the_most_that_is_allowed_is_expected() -> None:
    rows = [decoding(1, most=1000), decoding(9, most=100)]  # the guesses are not used
    assert order(SrtfPolicy(), rows) == [1, 0]


def test_history_tells_prompts_of_different_sizes_apart() -> None:
    policy = SrtfPolicy()
    for _ in range(100):
        arrive(policy, 0, num_prompt=4)
        policy.ended(0, 1500, completed=True)
        arrive(policy, 0, num_prompt=40)
        policy.ended(0, 10, completed=True)
    short_prompt = Row(4, 5, num_output_tokens=1, max_num_tokens=4000)
    long_prompt = Row(40, 41, num_output_tokens=1, max_num_tokens=4000)
    assert order(policy, [short_prompt, long_prompt]) == [1, 0]


def test_which_variants_are_oracles() -> None:
    for name, is_oracle, needs_history in (
        ("srtf", False, True),
        ("srtf:noisy", True, True),
        ("srtf:oracle", True, False),
    ):
        policy = create_policy(name)
        assert (policy.is_oracle, policy.needs_history) == (is_oracle, needs_history)


@pytest.mark.parametrize(
    "field",
    [
        {"predictor": "magic"},
        {"quantum_seconds": 0.0},
        {"ageing_seconds": 0.0},
        {"num_levels": 0},
        {"sigma": -0.1},
    ],
)
def test_bad_settings_are_named(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SrtfConfig(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["srtf", "srtf:oracle", "srtf:noisy"])
@pytest.mark.parametrize("num_units", [20, 24, 60])
def test_short_memory_loses_no_request(num_units: int, name: str) -> None:
    rig = make_rig(name, num_units=num_units, max_num_batched_tokens=5, max_num_seqs=3)
    specs = [
        replace(
            make_request(f"r{i}", prompt_len=2 + 5 * i, max_tokens=14 - i),
            expected_output_tokens=(None, 14 - i, 30)[i % 3],
        )
        for i in range(7)
    ]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}
