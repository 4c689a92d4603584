"""Chunked prefill: who gets the token budget, and who gives way."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.policies import Decision
from aptserve_scheduler.policies.base import THIS_ITERATION, Horizon
from aptserve_scheduler.policies.chunked import ChunkedConfig, ChunkedPolicy, shares
from support.problems import Row, make_problem
from support.scheduler import expected_tokens, make_request, make_rig, run_until_idle

DECODE = Row(num_computed=4, num_tokens=5)
WIDE = {"num_units": 1000, "max_num_batched_tokens": 64}


def decide(
    running: list[Row], waiting: list[Row] | None = None, budget: int = 512, **changes: object
) -> Decision:
    problem = make_problem(running, waiting, **{**WIDE, **changes})
    decision = ChunkedPolicy(ChunkedConfig(budget)).decide(problem)
    assert decision is not None
    assert set(decision.tiers.tolist()) == {Tier.KV}
    return decision


def chosen(decision: Decision) -> dict[int, int]:
    """Tokens by slot, in batch order."""
    return dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))


def test_decodes_then_prompts_under_way_then_new_ones_within_the_budget() -> None:
    running = [Row(4, 30), DECODE, Row(2, 20), DECODE]
    decision = decide(running, [Row(0, 8), Row(0, 8), Row(0, 8)], budget=58)
    assert list(chosen(decision).items()) == [(1, 1), (3, 1), (0, 26), (2, 18), (4, 8), (5, 4)]
    assert decision.reason.startswith("58 of 58 tokens: 2 of 4 running requests decode, 2 prompts")


def test_a_long_prompt_never_holds_up_a_decode() -> None:
    rig = make_rig(ChunkedPolicy(ChunkedConfig(8)), num_units=200)
    rig.add(make_request("a", prompt_len=4, max_tokens=8), make_request("long", prompt_len=40))
    batches = []
    for _ in range(6):
        batches.append({e.request_id: e.num_new_tokens for e in rig.plan().scheduled})
        rig.answer()
    assert batches[0] == {"a": 4, "long": 4}
    assert batches[1:] == [{"a": 1, "long": 7}] * 5


def test_the_worker_limit_caps_the_budget() -> None:
    assert chosen(decide([], [Row(0, 20)], max_num_batched_tokens=6)) == {0: 6}


def test_the_first_prompt_that_does_not_fit_ends_the_batch() -> None:
    waiting = [Row(0, 10), Row(0, 16), Row(0, 2)]
    assert chosen(decide([], waiting, num_units=50)) == {0: 10}


def test_a_prompt_starts_only_when_all_of_it_fits() -> None:
    running = [Row(10, 22)]  # holds 20 of 58 units and needs 24 more
    decision = decide(running, [Row(0, 8)], budget=4, num_units=58)
    assert chosen(decision) == {0: 4}
    decision = decide(running, [Row(0, 7)], budget=16, num_units=58)
    assert chosen(decision) == {0: 12, 1: 4}


def test_one_percent_stays_free_while_requests_run() -> None:
    assert chosen(decide([], [Row(0, 50)], num_units=100)) == {0: 50}
    assert chosen(decide([DECODE], [Row(0, 45)], num_units=100)) == {0: 1}


def test_no_more_hold_memory_than_fit_a_batch() -> None:
    assert chosen(decide([DECODE, DECODE], [Row(0, 2)] * 3, max_num_seqs=4)) == {
        0: 1,
        1: 1,
        2: 2,
        3: 2,
    }


def test_latest_arrivals_give_way_and_nobody_starts() -> None:
    running = [Row(9, 10), Row(10, 20), Row(9, 10)]  # 56 of 58 units; 2 + 4 + 2 more are needed
    decision = decide(running, [Row(0, 1)], budget=4, num_units=58)
    assert chosen(decision) == {0: 1, 1: 2}
    assert decision.preempted.tolist() == [2]


def test_ending_requests_keep_their_memory() -> None:
    ending = Row(num_computed=20, num_tokens=29, schedulable=False)
    decision = decide([Row(4, 5), ending, Row(4, 5)], num_units=58)
    assert chosen(decision) == {0: 1}
    assert decision.preempted.tolist() == [2]


def test_decodes_beyond_the_budget_sit_out() -> None:
    decision = decide([DECODE] * 5, budget=3)
    assert chosen(decision) == {0: 1, 1: 1, 2: 1}
    assert not len(decision.preempted)


def test_the_last_resort_keeps_to_the_budget() -> None:
    """The only decode does not fit; the earliest, a prompt, was left without a token by it."""
    decision = decide([Row(9, 20), Row(20, 21)], budget=1, num_units=58)
    assert chosen(decision) == {0: 1}


def test_it_repeats_itself_while_everyone_decodes() -> None:
    policy = ChunkedPolicy()
    for running, waiting, repeats in (
        ([DECODE, DECODE], [], True),
        ([DECODE, Row(2, 9)], [], False),
        ([DECODE], [Row(0, 3)], False),
    ):
        problem = make_problem(running, waiting, **WIDE)
        decision = policy.decide(problem)
        assert decision is not None
        expected = Horizon() if repeats else THIS_ITERATION
        assert policy.horizon(problem, decision) == expected


@pytest.mark.parametrize("num_units", [12, 24, 60])
def test_short_memory_loses_no_request(num_units: int) -> None:
    rig = make_rig("chunked", num_units=num_units, max_num_batched_tokens=5)
    specs = [make_request(f"r{i}", prompt_len=2 + 3 * i, max_tokens=9 - i) for i in range(6)]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


def test_shares_go_to_the_first_in_turn() -> None:
    assert shares(np.array([3, 4, 5]), 6).tolist() == [3, 3, 0]
    assert shares(np.array([3, 4, 5]), 0).tolist() == [0, 0, 0]


def test_a_budget_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget must be at least 1, not 0"):
        ChunkedConfig(0)
