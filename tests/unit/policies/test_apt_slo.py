"""The rules of our policy for objectives, one by one; its bound is in test_apt_slo_bound.py."""

from __future__ import annotations

import math

import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.apt_slo import AptSloConfig, AptSloPolicy
from aptserve_scheduler.policies.base import THIS_ITERATION, Horizon
from support.problems import Row, make_problem
from support.scheduler import HIDDEN, KV, make_cost

KV_ALONE = {"tiers": (KV,), "max_num_batched_tokens": 64}
ROOMY = {"num_units": 2000, "max_num_batched_tokens": 512}
MS_PER_TOKEN = CostCoefficients(0.01, 1e-3, 0.0, 0.0, {Tier.KV: 0.0, Tier.HIDDEN: 0.0})
"""10 ms for an iteration and 1 ms for each token computed."""


def decide(problem: BatchProblem, **config: float) -> Decision:
    decision = AptSloPolicy(AptSloConfig(**config)).decide(problem)
    assert decision is not None
    return decision


def chosen(decision: Decision) -> dict[int, int]:
    """Tokens by slot."""
    return dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))


def waiting(num_tokens: int, slack: float = 9.0, **changes: object) -> Row:
    """A request that has waited for a second and misses after ``slack`` more."""
    fields: dict[str, object] = {"miss_after_seconds": 1.0 + slack, "expected_output_tokens": 4}
    return Row(0, num_tokens, **{**fields, **changes})  # type: ignore[arg-type]


def decoding(num_computed: int, slack: float = 9.0, **changes: object) -> Row:
    fields: dict[str, object] = {"miss_after_seconds": 1.0 + slack, "expected_output_tokens": 4}
    return Row(num_computed, num_computed + 1, **{**fields, **changes})  # type: ignore[arg-type]


def pausable(num_computed: int, **changes: object) -> Row:
    """A long gap is forgiven it; it has so much to come that no memory of it is counted on."""
    endless = {"expected_output_tokens": 10**6, "max_num_tokens": 10**6}
    return decoding(num_computed, math.inf, **{**endless, **changes})


def late(row: Row) -> Row:
    return Row(**{**vars(row), "miss_after_seconds": -1.0})


# Who goes on


def test_decodes_chunks_of_prompts_and_new_prompts_share_a_batch() -> None:
    rows = [Row(4, 9), decoding(3)]
    problem = make_problem(rows, [waiting(4)], max_num_batched_tokens=64)
    assert chosen(decide(problem)) == {1: 1, 0: 5, 2: 4}


def test_those_longest_without_a_token_go_on_when_not_all_get_in() -> None:
    rows = [decoding(3, pending_seconds=seconds) for seconds in (0.5, 3.0, 2.0)]
    assert decide(make_problem(rows, max_num_batched_tokens=2)).slots.tolist() == [1, 2]


def test_the_late_give_way_to_growth_first() -> None:
    rows = [decoding(14), late(decoding(15))]
    decision = decide(make_problem(rows, tiers=(KV,)))
    assert (chosen(decision), decision.preempted.tolist()) == ({0: 1}, [1])


@pytest.mark.parametrize("to_come", [(9, 8), (8, 9)])
def test_then_the_costliest_of_the_live(to_come: tuple[int, int]) -> None:
    rows = [decoding(14, expected_output_tokens=num) for num in to_come]
    decision = decide(make_problem(rows, tiers=(KV,), num_units=56))
    assert decision.preempted.tolist() == [to_come.index(9)]


@pytest.mark.parametrize(("pauses", "expected"), [(True, 1), (False, 0)])
def test_but_before_them_those_that_can_be_paused(pauses: bool, expected: int) -> None:
    rows = [decoding(14, expected_output_tokens=9), pausable(14, expected_output_tokens=1)]
    decision = decide(make_problem(rows, tiers=(KV,), num_units=56), pauses=pauses)
    assert decision.preempted.tolist() == [expected]


def test_a_level_of_priority_halves_the_cost_of_a_live_request() -> None:
    rows = [decoding(14, expected_output_tokens=9, priority=2), decoding(15)]
    assert decide(make_problem(rows, tiers=(KV,))).preempted.tolist() == [1]


# Who starts


def test_what_must_start_first_starts_first() -> None:
    rows = [waiting(20, slack=5.0), waiting(20, slack=2.0)]
    problem = make_problem([], rows, max_num_seqs=1, num_units=100, **KV_ALONE)
    assert decide(problem).slots.tolist() == [1]


def test_the_costliest_is_put_off_when_memory_is_short() -> None:
    rows = [waiting(20), waiting(8), waiting(8)]  # 42, 18 and 18 of 58 units
    assert sorted(decide(make_problem([], rows, **KV_ALONE)).slots.tolist()) == [1, 2]


def test_priority_lowers_the_cost_of_serving_a_live_request() -> None:
    rows = [waiting(20, priority=2), waiting(8), waiting(8)]
    assert decide(make_problem([], rows, **KV_ALONE)).slots.tolist() == [0]


def test_the_longest_is_put_off_when_time_is_short() -> None:
    rows = [waiting(300, slack=0.35), waiting(100, slack=0.36)]  # 0.3 and 0.1 s of prompts
    problem = make_problem([], rows, cost=MS_PER_TOKEN, **ROOMY, tiers=(KV,))
    assert decide(problem, iteration_share=1.0).slots.tolist() == [1]


def test_late_running_requests_lose_their_memory_to_live_ones_only() -> None:
    rows = [late(decoding(20))]  # 40 units and 2 more now
    decision = decide(make_problem(rows, [waiting(10)], **KV_ALONE))
    assert (chosen(decision), decision.preempted.tolist()) == ({1: 10}, [0])
    decision = decide(make_problem(rows, [late(waiting(10))], **KV_ALONE))
    assert (chosen(decision), decision.preempted.tolist()) == ({0: 1}, [])


def test_live_requests_go_before_the_late() -> None:
    rows = [late(waiting(20)), waiting(20)]
    assert decide(make_problem([], rows, **KV_ALONE)).slots.tolist() == [1]


def test_the_late_go_by_priority_then_arrival() -> None:
    rows = [late(waiting(20, priority=priority)) for priority in (0, 1, 1)]
    assert decide(make_problem([], rows, **KV_ALONE)).slots.tolist() == [1]


def test_the_late_leave_what_the_running_grow_into() -> None:
    rows = [decoding(10, expected_output_tokens=9)]  # 22 units now, 18 more soon, 58 in all
    assert 1 not in chosen(decide(make_problem(rows, [late(waiting(9))], **KV_ALONE)))
    assert 1 in chosen(decide(make_problem(rows, [late(waiting(8))], **KV_ALONE)))


# Pausing


def with_put_off(row: Row, put_off: Row, **config: float) -> tuple[dict[int, int], list[int]]:
    """Beside a running request, one of 14 units that starts, and a costlier one put off."""
    problem = make_problem([row], [waiting(6), put_off], **KV_ALONE)
    decision = decide(problem, **config)
    return chosen(decision), decision.preempted.tolist()


CANNOT_WAIT = waiting(12)  # 26 units


def test_who_cannot_wait_starts_in_the_place_of_one_who_can_be_paused() -> None:
    assert with_put_off(pausable(20), CANNOT_WAIT) == ({1: 6, 2: 12}, [0])


def test_without_pauses_nobody_gives_way_for_it() -> None:
    assert with_put_off(pausable(20), CANNOT_WAIT, pauses=False) == ({0: 1, 1: 6}, [])


def test_nobody_gives_way_for_it_whose_memory_is_not_worth_computing_it_anew() -> None:
    # 20 of 29 tokens, endless: the whole pool would have to be held up for as long.
    assert with_put_off(pausable(20), CANNOT_WAIT, pause_gain=1e9) == ({0: 1, 1: 6}, [])
    soon_over = pausable(20, expected_output_tokens=1)
    assert with_put_off(soon_over, CANNOT_WAIT) == ({0: 1, 1: 6}, [])
    assert with_put_off(soon_over, CANNOT_WAIT, pause_gain=0.0) == ({1: 6, 2: 12}, [0])


def test_nobody_gives_way_for_it_who_would_miss_an_objective() -> None:
    row = pausable(20, miss_after_seconds=10.0)
    assert with_put_off(row, CANNOT_WAIT) == ({0: 1, 1: 6}, [])


def test_who_can_wait_does_so() -> None:
    assert with_put_off(pausable(20), waiting(12, slack=math.inf)) == ({0: 1, 1: 6}, [])
    assert with_put_off(pausable(20), late(waiting(12))) == ({0: 1, 1: 6}, [])


def test_all_the_memory_comes_from_the_paused() -> None:
    assert with_put_off(pausable(12), CANNOT_WAIT) == ({1: 6, 2: 12}, [0])  # 26 units with growth
    assert with_put_off(pausable(11), CANNOT_WAIT) == ({0: 1, 1: 6}, [])  # 24, and 20 are free


def test_the_costliest_are_paused_and_no_more_than_needed() -> None:
    rows = [pausable(5), pausable(6), pausable(7, priority=9)]
    problem = make_problem(rows, [waiting(1), waiting(9)], **KV_ALONE)  # 20 units for the latter
    decision = decide(problem)
    assert (chosen(decision), decision.preempted.tolist()) == ({2: 1, 3: 1, 4: 9}, [0, 1])


# Tiers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_units": 1000}, Tier.KV),  # plenty
        ({}, Tier.HIDDEN),  # short, and hidden tokens cost next to nothing more
        ({"cost": make_cost(seconds_per_cached_token={Tier.KV: 0.0, Tier.HIDDEN: 1.0})}, Tier.KV),
        ({"tiers": (KV,)}, Tier.KV),
    ],
)
def test_a_cache_is_hidden_when_memory_is_short_and_it_costs_little(
    changes: dict[str, object], expected: Tier
) -> None:
    assert decide(make_problem([], [waiting(8)], **changes)).tiers.tolist() == [expected]


def test_what_keys_and_values_could_not_hold_is_hidden_at_any_cost() -> None:
    cost = make_cost(seconds_per_cached_token={Tier.KV: 0.0, Tier.HIDDEN: 1.0})
    row = waiting(8, max_num_tokens=50)
    assert decide(make_problem([], [row], cost=cost)).tiers.tolist() == [Tier.HIDDEN]


@pytest.mark.parametrize(
    ("seconds", "queue", "num_units", "expected"),
    [
        (1.0, [], 100, Tier.KV),
        (1e-7, [], 100, Tier.HIDDEN),  # would not pay
        (1.0, [late(waiting(40))], 100, Tier.HIDDEN),  # somebody waits
        (1.0, [], 32, Tier.HIDDEN),  # a fifth of the pool stays free
    ],
)
def test_a_hidden_cache_is_promoted_when_it_pays_and_nobody_needs_the_memory(
    seconds: float, queue: list[Row], num_units: int, expected: Tier
) -> None:
    cost = make_cost(seconds_per_cached_token={Tier.KV: 0.0, Tier.HIDDEN: seconds})
    rows = [decoding(14, tier=Tier.HIDDEN, max_num_tokens=16, expected_output_tokens=2)]
    problem = make_problem(rows, queue, cost=cost, num_units=num_units, tiers=(KV, HIDDEN))
    assert decide(problem).tiers[0] == expected


# Chunks


def chunk_beside_decode(slack: float, prompts: list[int], **changes: object) -> list[int]:
    """Tokens of new prompts beside a decode with so much slack; a step of it takes 11 ms."""
    rows = [decoding(10, slack=slack, max_num_tokens=900)]
    queue = [waiting(num, max_num_tokens=900, **changes) for num in prompts]
    problem = make_problem(rows, queue, cost=MS_PER_TOKEN, **ROOMY, tiers=(KV,))
    return decide(problem).num_tokens.tolist()[1:]


def test_a_chunk_keeps_the_iteration_within_half_the_smallest_slack() -> None:
    assert chunk_beside_decode(0.4, [300]) == [pytest.approx(200 - 11, abs=1)]


def test_the_first_chunk_has_at_least_64_tokens() -> None:
    assert chunk_beside_decode(0.1, [300]) == [64]


def test_what_is_left_goes_to_the_next_if_that_is_a_chunk() -> None:
    assert sorted(chunk_beside_decode(0.4, [100, 110])) == [pytest.approx(79, abs=1), 110]
    assert chunk_beside_decode(0.4, [150, 151]) == [151]


def test_an_iteration_takes_at_most_a_share_of_the_first_token_objective() -> None:
    assert chunk_beside_decode(9.0, [300], ttft_seconds=0.4) == [pytest.approx(100 - 11, abs=1)]


def test_nobody_joins_who_would_make_another_late() -> None:
    for slack, expected in ((0.15, [0]), (9.0, [0, 1])):
        rows = [waiting(64, slack=slack, max_num_tokens=900), waiting(300, max_num_tokens=900)]
        problem = make_problem([], rows, cost=MS_PER_TOKEN, **ROOMY, tiers=(KV,))
        assert sorted(decide(problem).slots.tolist()) == expected


# The policy itself


def test_it_repeats_itself_while_everyone_decodes_in_kv() -> None:
    policy = AptSloPolicy()
    for rows, queue, expected in (
        ([decoding(3), decoding(4)], [], True),
        ([decoding(3), decoding(4, tier=Tier.HIDDEN)], [], False),
        ([decoding(3), Row(4, 6)], [], False),
        ([decoding(3)], [late(waiting(28))], False),
    ):
        problem = make_problem(rows, queue, tiers=(KV, HIDDEN))
        decision = policy.decide(problem)
        assert decision is not None
        horizon = policy.horizon(problem, decision)
        assert horizon == (Horizon() if expected else THIS_ITERATION)


@pytest.mark.parametrize(
    "config",
    [
        {"patience_seconds": -1.0},
        {"lane_share": 0.0},
        {"slack_share": 1.1},
        {"pause_gain": -1.0},
        {"iteration_share": 0},
    ],
)
def test_a_setting_out_of_range_is_named(config: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        AptSloConfig(**config)
