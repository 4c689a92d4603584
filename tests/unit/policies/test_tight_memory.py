"""Problems made by hand in which memory is so short that the usual rules find nobody."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import BatchProblem, Candidates, create_policy
from support.scheduler import HIDDEN, KV, make_cost

POLICIES = ("fcfs", "apt")
POOL = 58


@dataclass
class Row:
    """A request by its lengths; blocks are one token, 2 units in KV and 1 in hidden."""

    num_computed: int
    num_tokens: int
    tier: Tier = Tier.KV
    schedulable: bool = True
    max_num_tokens: int = 29
    pending_seconds: float = 1.0

    @property
    def num_units(self) -> int:
        return self.num_computed * (2 if self.tier is Tier.KV else 1)


def candidates(first_slot: int, rows: list[Row]) -> Candidates:
    num = len(rows)
    return Candidates(
        slots=np.arange(first_slot, first_slot + num),
        pending_seconds=np.array([row.pending_seconds for row in rows]),
        num_tokens=np.array([row.num_tokens for row in rows], np.int64),
        num_computed_tokens=np.array([row.num_computed for row in rows], np.int64),
        max_num_tokens=np.array([row.max_num_tokens for row in rows], np.int64),
        num_units=np.array([row.num_units for row in rows], np.int64),
        tiers=np.array([row.tier if row.num_computed else 0 for row in rows], np.int8),
        schedulable=np.array([row.schedulable for row in rows], np.bool_),
        missed=np.zeros(num, np.bool_),
        ttft_seconds=np.full(num, 10.0),
        tbt_seconds=np.full(num, 10.0),
    )


def make_problem(
    running: list[Row], waiting: list[Row] | None = None, hidden_seconds: float = 1.5e-7
) -> BatchProblem:
    """A worker of 58 units (29 tokens in KV) whose batches hold 8 tokens; running slots from 0."""
    return BatchProblem(
        now=1.0,
        num_units=POOL,
        num_free_units=POOL - sum(row.num_units for row in running),
        block_size=1,
        tiers=(KV, HIDDEN),
        max_num_seqs=8,
        max_num_batched_tokens=8,
        cost=make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: hidden_seconds}),
        waiting=candidates(len(running), waiting or []),
        running=candidates(0, running),
    )


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


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_held_by_requests_whose_end_is_in_flight_is_waited_for(policy: str) -> None:
    ending = Row(num_computed=28, num_tokens=29, schedulable=False)
    rows = [Row(1, 2), ending]
    assert create_policy(policy).decide(make_problem(rows)) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_running_and_nothing_waiting_is_no_plan(policy: str) -> None:
    assert create_policy(policy).decide(make_problem([])) is None


@pytest.mark.parametrize("hidden_seconds", [1.0, 1e6])
def test_nothing_worth_its_time_in_a_decode_still_decodes(hidden_seconds: float) -> None:
    """Every value is negative and KV could not hold them: the hidden requests run all the same."""
    rows = [Row(20, 21, Tier.HIDDEN, max_num_tokens=50) for _ in range(2)]
    decision = create_policy("apt").decide(make_problem(rows, hidden_seconds=hidden_seconds))
    assert decision is not None
    assert len(decision.slots) >= 1
    assert set(decision.tiers.tolist()) == {Tier.HIDDEN}


def test_a_waiting_request_of_negative_value_still_gets_its_turn() -> None:
    waiting = [Row(0, 8, max_num_tokens=50)]  # only hidden can hold it to the end
    decision = create_policy("apt").decide(make_problem([], waiting, hidden_seconds=1e6))
    assert decision is not None
    assert decision.tiers.tolist() == [Tier.HIDDEN]
