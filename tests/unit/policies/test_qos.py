"""Chunks by slack, prompts by deadline and work, and who is relegated."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import Decision, create_policy
from aptserve_scheduler.policies.base import THIS_ITERATION, Arrival, Horizon
from aptserve_scheduler.policies.qos import QosConfig, QosPolicy
from aptserve_scheduler.policies.slack import Pace
from support.problems import Row, make_problem
from support.scheduler import expected_tokens, make_request, make_rig, run_until_idle

# An iteration takes 100 ms, a token 10 ms more: chunks are easily told from slack.
COST = CostCoefficients(0.1, 0.01, 0.0, 0.0, {Tier.KV: 0.0, Tier.HIDDEN: 0.0})
WIDE = {"num_units": 10_000, "max_num_batched_tokens": 4096, "max_num_seqs": 64, "cost": COST}


def decode(slack: float = 10.0, **changes: object) -> Row:
    fields = {"pending_seconds": 0.0, "tbt_seconds": slack, "num_output_tokens": 1}
    return Row(4, 5, max_num_tokens=400, **{**fields, **changes})  # type: ignore[arg-type]


def prompt(num_tokens: int, left: float = 100.0, **changes: object) -> Row:
    """A prompt whose first token is due in so many seconds."""
    fields = {"pending_seconds": 0.0, "ttft_seconds": left, "max_num_tokens": num_tokens + 8}
    return Row(0, num_tokens, **{**fields, **changes})  # type: ignore[arg-type]


def make_policy(num_arrived: int = 64, **config: object) -> QosPolicy:
    policy = QosPolicy(QosConfig(**{"least_tokens": 1, **config}))  # type: ignore[arg-type]
    for slot in range(num_arrived):
        policy.arrived(Arrival(slot, 0.0, "", 0, 8, 0, 20, None))
    return policy


def decide(
    running: list[Row],
    waiting: list[Row] | None = None,
    policy: QosPolicy | None = None,
    **changes: object,
) -> Decision:
    decision = (policy or make_policy()).decide(
        make_problem(running, waiting, **{**WIDE, **changes})
    )
    assert decision is not None
    assert set(decision.tiers.tolist()) == {Tier.KV}
    return decision


def chosen(decision: Decision) -> dict[int, int]:
    """Tokens by slot."""
    return dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))


def order(decision: Decision) -> list[int]:
    return decision.slots.tolist()


# Chunks


def test_prompts_get_what_the_smallest_slack_leaves() -> None:
    """0.1 s, 2 decodes of 0.01 s: of 0.505 s are 38 tokens left."""
    decision = decide([decode(0.505), decode(0.8)], [prompt(100)])
    assert chosen(decision) == {0: 1, 1: 1, 2: 38}
    assert "2 of 2 running requests decode with 0.505 s of slack beside 38 tokens" in (
        decision.reason
    )


def test_time_already_waited_is_taken_off() -> None:
    decision = decide([decode(0.505, pending_seconds=0.2)], [prompt(100)])
    assert chosen(decision) == {0: 1, 1: 19}


def test_a_token_in_flight_comes_first() -> None:
    """Two tokens beyond the one received: the wait for the next starts when that one comes."""
    rows = [Row(5, 6, pending_seconds=0.2, tbt_seconds=0.505, num_output_tokens=1)]
    problem = make_problem(rows, **WIDE)
    object.__setattr__(problem.running, "num_prompt_tokens", np.array([4]))
    assert Pace.of(problem, np.array([0])).slack_seconds == 0.505


@pytest.mark.parametrize(
    "hopeless", [decode(0.505, miss_after_seconds=-1.0), decode(0.105), decode(0.3)]
)
def test_who_cannot_be_saved_does_not_count(hopeless: Row) -> None:
    """Lost for good; late even without prompts; the last one can be saved."""
    can_be_saved = hopeless.tbt_seconds == 0.3
    decision = decide([hopeless], [prompt(100)])
    assert chosen(decision)[1] == (19 if can_be_saved else 100)


def test_prompts_get_the_least_however_small_the_slack() -> None:
    policy = make_policy(least_tokens=7)
    assert chosen(decide([decode(0.115)], [prompt(100)], policy)) == {0: 1, 1: 7}


def test_without_decodes_the_batch_is_as_large_as_it_may_be() -> None:
    policy = make_policy(most_tokens=60)
    assert chosen(decide([], [prompt(40), prompt(40)], policy)) == {0: 40, 1: 20}
    assert chosen(decide([], [prompt(40)], policy, max_num_batched_tokens=9)) == {0: 9}


@pytest.mark.parametrize("seed", range(10))
def test_the_foretold_time_just_fits_the_slack(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = CostCoefficients(1e-3, 1e-5, 1e-4, float(rng.choice([0.0, 1e-7])), {})
    computed, left = rng.integers(0, 300, 12), rng.integers(1, 300, 12)
    pace = Pace(0.002, 0.002 + float(rng.random()) * 0.02)
    num_tokens = pace.num_tokens(cost, computed, left)

    def seconds(num: int) -> float:
        chunks = np.clip(num - (np.cumsum(left) - left), 0, left)
        used = chunks > 0
        pairs = chunks * (computed + chunks / 2)
        return float(
            0.002 + 1e-5 * num + 1e-4 * used.sum() + cost.seconds_per_attention_pair * pairs.sum()
        )

    assert seconds(num_tokens) <= pace.slack_seconds + 1e-12
    if num_tokens < left.sum():
        assert seconds(num_tokens + 1) > pace.slack_seconds - 1e-12


# Order


def test_alpha_goes_from_shortest_remaining_to_earliest_deadline() -> None:
    waiting = [prompt(300, 3.5), prompt(50, 5.0), prompt(100, 4.0)]  # 3 s, 0.5 s, 1 s of work
    assert order(decide([], waiting, make_policy(alpha=0.0))) == [1, 2, 0]
    assert order(decide([], waiting, make_policy(alpha=1.0))) == [0, 2, 1]
    assert order(decide([], waiting, make_policy(alpha=0.5))) == [2, 1, 0]


def test_a_pressing_prompt_overtakes_one_under_way_which_keeps_its_memory() -> None:
    under_way = Row(10, 60, pending_seconds=0.0, ttft_seconds=50.0, max_num_tokens=100)
    decision = decide([under_way], [prompt(30, 1.0)], make_policy(most_tokens=20))
    assert chosen(decision) == {1: 20}
    assert decision.preempted.tolist() == []


def test_the_first_that_has_no_memory_keeps_out_those_after_it_but_not_those_under_way() -> None:
    under_way = Row(4, 10, pending_seconds=0.0, ttft_seconds=90.0, max_num_tokens=20)
    waiting = [prompt(5, 10.0), prompt(40, 20.0), prompt(5, 30.0)]
    # 58 units: 8 held, 12 promised, 1 % is none; 10 for the first, 80 for the second
    decision = decide([under_way], waiting, num_units=58)
    assert chosen(decision) == {1: 5, 0: 6}


def test_memory_for_decodes_is_taken_from_the_latest_and_nobody_starts() -> None:
    running = [Row(13, 14, num_output_tokens=1), Row(15, 16, num_output_tokens=1)]
    decision = decide(running, [prompt(1)], num_units=58)
    assert chosen(decision) == {0: 1}
    assert decision.preempted.tolist() == [1]


def test_no_more_hold_memory_than_there_are_rows() -> None:
    decision = decide([decode(), decode()], [prompt(4)] * 5, max_num_seqs=4)
    assert len(decision.slots) == 4


# Relegation


def test_of_the_late_the_one_with_the_most_work_is_relegated() -> None:
    """Five of 100 tokens each in 1.5 s: one in five may be relegated, and is served last."""
    waiting = [prompt(n, 3.0) for n in (100, 100, 140, 100, 100)]
    policy = make_policy(relegated_share=0.2)
    first = decide([], waiting, policy)
    assert order(first)[-1] == 2
    assert "5 wait, 1 of them relegated" in first.reason
    assert order(decide([], waiting, make_policy(relegated_share=0.19)))[-1] == 2  # by work alone
    assert "0 of them relegated" in decide([], waiting, make_policy(relegated_share=0.19)).reason


def test_the_eager_variant_relegates_all_that_are_late() -> None:
    policy = create_policy("qos:eager")
    for slot in range(5):
        policy.arrived(Arrival(slot, 0.0, "", 0, 8, 0, 20, None))
    waiting = [prompt(n, 3.0) for n in (100, 100, 140, 100, 100)]
    decision = policy.decide(make_problem([], waiting, **WIDE))
    assert decision is not None
    assert "3 of them relegated" in decision.reason  # in order of work the third ends after 3.1 s


def test_nobody_is_relegated_without_need() -> None:
    waiting = [prompt(10, 3.0)] * 5
    assert "0 of them relegated" in decide([], waiting, make_policy(relegated_share=1.0)).reason


def test_the_lowest_priority_is_relegated_first_then_who_is_late_already() -> None:
    late = prompt(100, 1.0, pending_seconds=2.0)
    waiting = [prompt(140, 1.0), late, prompt(140, 1.0, priority=-1)]
    policy = make_policy(relegated_share=0.34, alpha=0.0)
    assert order(decide([], waiting, policy)) == [1, 0, 2]
    waiting[2] = prompt(140, 1.0, priority=1)
    policy = make_policy(relegated_share=0.34, alpha=0.0)
    assert order(decide([], waiting, policy)) == [0, 2, 1]


def test_relegation_ends_after_its_time_and_does_not_come_again() -> None:
    waiting = [prompt(100, 1.0), prompt(10, 1.0)]
    policy = make_policy(relegated_share=0.5, relegated_seconds=5.0, alpha=1.0)
    assert order(decide([], waiting, policy, now=1.0)) == [1, 0]
    assert order(decide([], waiting, policy, now=5.9)) == [1, 0]
    assert order(decide([], waiting, policy, now=6.0)) == [0, 1]
    for slot in (0, 1):  # the slots are others' now
        policy.arrived(Arrival(slot, 7.0, "", 0, 8, 0, 20, None))
    assert order(decide([], waiting, policy, now=7.0)) == [1, 0]


def test_overload_delays_the_relegated_but_serves_everyone() -> None:
    rig = make_rig(QosPolicy(QosConfig(relegated_share=0.3)), num_units=60)
    specs = [make_request(f"r{i}", 4 + 3 * (i % 5), 6, ttft=1e-3) for i in range(20)]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.1),
        ("relegated_share", -0.1),
        ("least_tokens", 0),
        ("most_tokens", 0),
        ("relegated_seconds", 0.0),
    ],
)
def test_bad_settings_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        QosConfig(**{field: value})  # type: ignore[arg-type]


# Runs of decodes


def horizon(
    waiting: list[Row], *, num_free: int, policy: QosPolicy | None = None, now: float = 1.0
) -> Horizon:
    """After a decision for one decode beside these, with so many units free for new requests."""
    policy = policy or make_policy(relegated_share=0.0)
    # The decode holds 8 units; that it grows is left out of account.
    problem = make_problem([decode()], waiting, **{**WIDE, "num_units": num_free + 8, "now": now})
    decision = policy.decide(problem)
    assert decision is not None
    return policy.horizon(problem, decision)


def test_it_repeats_itself_while_the_first_in_line_lacks_memory() -> None:
    assert horizon([], num_free=2) == Horizon()
    assert horizon([prompt(20, left=1.0), prompt(30)], num_free=39) == Horizon()
    assert horizon([prompt(20, left=1.0), prompt(30)], num_free=40) == THIS_ITERATION
    # A shorter one further back does not overtake it.
    assert horizon([prompt(20, left=1.0), prompt(2)], num_free=39) == Horizon()


def test_requests_that_rank_alike_may_change_places() -> None:
    """The earlier one does not fit, but rounding may put the later one first another time."""
    longer, shorter = prompt(20, left=5.0), prompt(10, left=5.1)
    policy = make_policy(alpha=0.5, relegated_share=0.0)
    assert horizon([longer, shorter], num_free=39, policy=policy) == THIS_ITERATION
    assert horizon([longer, prompt(10, left=5.2)], num_free=39, policy=policy) == Horizon()


def test_it_repeats_itself_until_somebody_counts_like_the_others_again() -> None:
    policy = make_policy(relegated_share=0.5, relegated_seconds=60.0)
    late = prompt(30, left=0.1)
    assert horizon([late, prompt(20)], num_free=39, policy=policy, now=3.0) == Horizon(until=63.0)


def test_it_looks_again_while_somebody_may_yet_be_relegated() -> None:
    policy = make_policy(relegated_share=1.0)
    assert horizon([prompt(30)], num_free=39, policy=policy) == THIS_ITERATION
