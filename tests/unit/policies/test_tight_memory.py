"""Problems made by hand in which memory is so short that the usual rules find nobody."""

from __future__ import annotations

import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import create_policy, policy_names
from support.problems import Row, make_problem
from support.scheduler import make_cost

POLICIES = ("fcfs", "apt")


def hidden_costs(seconds: float) -> CostCoefficients:
    return make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: seconds})


HALF_A_PROMPT = Row(num_computed=8, num_tokens=16)
FILLS_THE_REST = Row(num_computed=21, num_tokens=22)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_earliest_goes_on_when_neither_prompt_nor_decode_has_room(policy: str) -> None:
    decision = create_policy(policy).decide(make_problem([HALF_A_PROMPT, FILLS_THE_REST]))
    assert decision is not None
    assert decision.slots.tolist() == [0]
    assert decision.num_tokens.tolist() == [8]
    assert decision.preempted.tolist() == [1]
    assert "memory is short" in decision.reason


@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_prompt_gives_way_to_an_earlier_decode(policy: str) -> None:
    decision = create_policy(policy).decide(make_problem([FILLS_THE_REST, HALF_A_PROMPT]))
    assert decision is not None
    assert decision.slots.tolist() == [0]
    assert decision.num_tokens.tolist() == [1]
    assert decision.preempted.tolist() == [1]


@pytest.mark.parametrize("policy", POLICIES)
def test_no_more_give_way_than_must(policy: str) -> None:
    rows = [Row(8, 16), Row(4, 12), Row(9, 17), Row(8, 16)]  # 58 units, all prompts under way
    decision = create_policy(policy).decide(make_problem(rows))
    assert decision is not None
    assert decision.slots.tolist() == [0]
    assert decision.preempted.tolist() == [3]  # 16 units: just what 8 tokens take


@pytest.mark.parametrize("policy", policy_names())
def test_memory_held_by_requests_whose_end_is_in_flight_is_waited_for(policy: str) -> None:
    ending = Row(num_computed=28, num_tokens=29, schedulable=False)
    rows = [Row(1, 2), ending]
    assert create_policy(policy).decide(make_problem(rows)) is None


@pytest.mark.parametrize("policy", policy_names())
def test_nothing_running_and_nothing_waiting_is_no_plan(policy: str) -> None:
    assert create_policy(policy).decide(make_problem([])) is None


@pytest.mark.parametrize("hidden_seconds", [1.0, 1e6])
def test_nothing_worth_its_time_in_a_decode_still_decodes(hidden_seconds: float) -> None:
    """Every value is negative and KV could not hold them: the hidden requests run all the same."""
    rows = [Row(20, 21, Tier.HIDDEN, max_num_tokens=50) for _ in range(2)]
    decision = create_policy("apt").decide(make_problem(rows, cost=hidden_costs(hidden_seconds)))
    assert decision is not None
    assert len(decision.slots) >= 1
    assert set(decision.tiers.tolist()) == {Tier.HIDDEN}


def test_a_waiting_request_of_negative_value_still_gets_its_turn() -> None:
    waiting = [Row(0, 8, max_num_tokens=50)]  # only hidden can hold it to the end
    decision = create_policy("apt").decide(make_problem([], waiting, cost=hidden_costs(1e6)))
    assert decision is not None
    assert decision.tiers.tolist() == [Tier.HIDDEN]
