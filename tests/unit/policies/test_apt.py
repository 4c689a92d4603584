"""The paper's policy: kind of iteration, choice of tiers, and the released code's slips."""

from __future__ import annotations

import random

import pytest
from aptserve_scheduler.core import BatchPlan, Scheduler, Tier, TierSpec
from aptserve_scheduler.policies import apt
from support.problems import Row, make_problem
from support.scheduler import (
    WORKER,
    CheckingWorker,
    expected_tokens,
    make_cost,
    make_request,
    make_scheduler,
    make_worker,
    run_until_idle,
)

CHEAP_HIDDEN = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 1e-7})
DEAR_HIDDEN = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 10.0})


class Pair:
    """An ``apt`` scheduler of depth 1 with its worker."""

    def __init__(self, **worker: object) -> None:
        self.scheduler: Scheduler = make_scheduler("apt", **worker)  # type: ignore[arg-type]
        self.worker = CheckingWorker(make_worker(**worker))

    def add(self, request_id: str, now: float, prompt_len: int = 8, **changes: object) -> None:
        """A request that arrives at ``now``."""
        spec = make_request(request_id, prompt_len, **changes)  # type: ignore[arg-type]
        self.scheduler.add_request(spec, now)

    def plan(self, now: float) -> BatchPlan:
        """The next plan, not run."""
        plan = self.scheduler.plan(WORKER, now)
        assert plan is not None
        self.scheduler.check_integrity()
        return plan

    def step(self, now: float, seconds: float = 0.0) -> BatchPlan:
        """The next plan, run for ``seconds`` from ``now`` on."""
        plan = self.plan(now)
        self.worker.receive(plan)
        self.scheduler.apply(WORKER, self.worker.step(), now + seconds)
        return plan


def chosen(plan: BatchPlan) -> dict[str, Tier]:
    """Requests of a plan with their tiers."""
    return {entry.request_id: entry.tier for entry in plan.scheduled}


def test_prefill_when_the_waiting_have_more_pending_time() -> None:
    pair = Pair()
    pair.add("a", 0.0)
    pair.step(0.0)  # last token of a at 0
    pair.add("b", 1.0)
    decode = pair.plan(1.4)  # a has 1.4 s, b 0.4 s
    assert set(chosen(decode)) == {"a"}
    assert "decode: 1 waiting requests have 0.4 s pending against 1.4 s of 1" in decode.reason


def test_decode_when_the_running_have_more_pending_time() -> None:
    pair = Pair()
    pair.add("a", 0.0)
    pair.step(0.0)
    pair.add("b", 0.1)
    pair.add("c", 0.1)
    prefill = pair.plan(1.0)  # a has 1 s, b and c together 1.8 s
    assert set(chosen(prefill)) == {"b", "c"}
    assert prefill.reason.startswith("prefill: 2 waiting requests have 1.8 s pending")


def test_decode_when_nothing_waiting_fits() -> None:
    pair = Pair(num_units=20)
    pair.add("a", 0.0, prompt_len=32, max_tokens=8)
    pair.step(0.0)
    pair.add("b", 0.0, prompt_len=60)
    assert set(chosen(pair.plan(5.0))) == {"a"}


def test_short_of_memory_hidden_when_it_costs_nothing() -> None:
    pair = Pair(num_units=20, cost=CHEAP_HIDDEN)
    for name in "abcd":
        pair.add(name, 0.0, prompt_len=15)  # 4 units hidden, 8 in KV
    tiers = chosen(pair.plan(0.5))
    assert len(tiers) == 4
    assert Tier.HIDDEN in tiers.values()


def test_kv_when_hidden_costs_more_than_half_of_what_it_relieves() -> None:
    pair = Pair(num_units=20, cost=DEAR_HIDDEN)
    for name in "abcd":
        pair.add(name, 0.0, prompt_len=15)
    assert set(chosen(pair.plan(0.5)).values()) == {Tier.KV}


def test_kv_when_there_is_room_for_all() -> None:
    pair = Pair()
    for name in "abcd":
        pair.add(name, 0.0, prompt_len=8)
    assert set(chosen(pair.plan(0.5)).values()) == {Tier.KV}


def hidden_pair(**worker: object) -> Pair:
    """Two running requests, of which at least one is in hidden for want of memory."""
    pair = Pair(**{"num_units": 13, "cost": CHEAP_HIDDEN, **worker})
    pair.add("a", 0.0, prompt_len=15, max_tokens=20)
    pair.add("b", 0.0, prompt_len=15, max_tokens=20)
    assert Tier.HIDDEN in chosen(pair.step(0.5)).values()
    return pair


def test_a_running_hidden_request_keeps_decoding() -> None:
    """The released code preempts a running hidden request at every decode step."""
    pair = hidden_pair()
    for step in range(8):
        plan = pair.step(0.6 + step)
        assert set(chosen(plan)) == {"a", "b"}
        assert plan.preempted == ()


def test_hidden_is_promoted_in_place_when_memory_is_there() -> None:
    dearer = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 1e-4})
    pair = Pair(num_units=20, cost=dearer)
    for name, max_tokens in (("a", 1), ("b", 1), ("c", 20)):
        pair.add(name, 0.0, prompt_len=20, max_tokens=max_tokens)
    first = chosen(pair.step(0.5))
    hidden = [name for name, tier in first.items() if tier is Tier.HIDDEN]
    assert "c" in hidden
    plan = pair.step(0.6)  # a and b are over
    assert plan.promoted == ("c",)
    assert len(plan.promote) == 1
    assert chosen(plan) == {"c": Tier.KV}
    assert pair.scheduler.snapshot(1.0).totals.num_promotions == 1


def test_promotion_never_costs_another_request_its_memory() -> None:
    pair = hidden_pair(cost=make_cost(seconds_per_cached_token={Tier.KV: 0.0, Tier.HIDDEN: 1e-4}))
    for step in range(6):
        assert pair.step(0.6 + step).preempted == ()


def test_worthless_hidden_caches_still_decode_when_nothing_else_can() -> None:
    """Re-projection so dear that by the formula nobody should run: they run all the same."""
    pair = hidden_pair(num_units=9)
    worker = pair.scheduler._state.worker(WORKER)
    worker.cost = type(worker.cost)(DEAR_HIDDEN, worker.cost.tiers)
    assert len(pair.plan(0.5 + 1e-6).scheduled) >= 1


def test_who_missed_the_objective_comes_last_whatever_the_wait() -> None:
    pair = Pair(num_units=16, cost=DEAR_HIDDEN)
    pair.add("late", 0.0, prompt_len=20, ttft=1.0)
    pair.add("good", 4.5, prompt_len=20, ttft=1.0)
    assert set(chosen(pair.plan(5.0))) == {"good"}


def test_order_among_the_missed_is_kept() -> None:
    pair = Pair(num_units=16, cost=DEAR_HIDDEN)
    pair.add("less", 1.0, prompt_len=20, ttft=0.1)
    pair.add("more", 0.5, prompt_len=20, ttft=0.1)
    assert set(chosen(pair.plan(5.0))) == {"more"}


def test_the_missed_run_when_there_is_room() -> None:
    pair = Pair()
    pair.add("late", 0.0, ttft=0.1)
    pair.add("good", 4.9, ttft=1.0)
    assert set(chosen(pair.plan(5.0))) == {"late", "good"}


def test_double_check_takes_the_one_large_request_that_is_worth_more() -> None:
    """The released code's double check stores no request id and schedules nothing."""
    pair = Pair(num_units=32, cost=DEAR_HIDDEN, max_num_batched_tokens=1000)
    pair.add("small", 9.0, prompt_len=3, ttft=100.0)  # 2 units, 0.7 s: 0.35 per unit
    pair.add("large", 0.0, prompt_len=58, ttft=100.0)  # 30 units, 9.7 s: 0.32 per unit
    pair.add("tiny", 9.0, prompt_len=3, ttft=100.0)
    pair.add("large2", 0.0, prompt_len=58, ttft=100.0)
    assert set(chosen(pair.plan(9.7))) & {"large", "large2"}


def test_first_candidate_over_the_token_budget_does_not_empty_the_queue() -> None:
    """In the released code the waiting queue then comes back empty."""
    pair = Pair(max_num_batched_tokens=16, num_units=200)
    pair.add("long", 0.0, prompt_len=40, ttft=0.1)
    pair.add("a", 0.9)
    pair.add("b", 0.9)
    assert set(chosen(pair.plan(1.0))) == {"a", "b"}


def test_a_prompt_longer_than_the_budget_goes_in_chunks() -> None:
    size = {"max_num_batched_tokens": 16}
    pair = Pair(**size)
    spec = make_request("long", prompt_len=60)
    pair.scheduler.add_request(spec, 0.0)
    outcome = run_until_idle(pair.scheduler, pair.worker)
    assert outcome.tokens["long"] == expected_tokens(spec)


def test_nothing_selected_in_a_decode_does_not_raise() -> None:
    """The released code raises when a decode selects nobody."""
    pair = Pair(num_units=8, block_size=4)
    pair.add("a", 0.0, prompt_len=8, max_tokens=8)
    pair.step(0.0)
    assert set(chosen(pair.plan(0.0))) == {"a"}


def test_a_request_that_only_hidden_can_hold_is_served() -> None:
    """Its hidden value is negative, KV could never take it to its end."""
    pair = Pair(num_units=20, cost=DEAR_HIDDEN)
    spec = make_request("a", prompt_len=50, max_tokens=20)  # 18 blocks: 36 units in KV
    pair.scheduler.add_request(spec, 0.0)
    outcome = run_until_idle(pair.scheduler, pair.worker)
    assert outcome.tokens["a"] == expected_tokens(spec)


def test_odd_block_counts_give_no_upgrade_before_its_own_base() -> None:
    """In the released code an upgrade may be taken before its own admission."""
    pair = Pair(num_units=11, cost=CHEAP_HIDDEN)
    for name in "abc":
        pair.add(name, 0.0, prompt_len=11, max_tokens=8)  # 3 blocks
    outcome = run_until_idle(pair.scheduler, pair.worker, now=0.5)
    assert len(outcome.finished) == 3


def test_objectives_are_the_requests_own() -> None:
    """Constants in the server in the released code."""
    pair = Pair(num_units=16, cost=DEAR_HIDDEN)
    pair.add("strict", 0.0, prompt_len=20, ttft=0.5)
    pair.add("patient", 0.1, prompt_len=20, ttft=50.0)
    assert set(chosen(pair.plan(1.0))) == {"patient"}


def test_admission_leaves_room_for_the_next_decode() -> None:
    pair = Pair(num_units=20, tiers=(TierSpec(Tier.KV, 2),))
    pair.add("a", 0.0, prompt_len=16, max_tokens=8)
    pair.step(0.0)  # 8 units; the next token takes 2 more
    pair.add("b", 0.0, prompt_len=17)  # 10 units would leave 2, 12 would leave none
    pair.add("c", 0.0, prompt_len=20)
    plan = pair.plan(0.001)
    assert set(chosen(plan)) == {"b"}


def test_memory_forces_out_the_least_worthy_alone() -> None:
    kv_only = (TierSpec(Tier.KV, 2),)
    pair = Pair(num_units=12, tiers=kv_only)
    for name, ttft in (("a", 1.0), ("b", 0.1), ("c", 1.0)):
        pair.add(name, 0.0, prompt_len=7, max_tokens=10, ttft=ttft)
    assert len(chosen(pair.step(0.5))) == 3  # b missed its first token
    pair.step(0.6)
    plan = pair.step(0.7)
    assert plan.preempted == ("b",)
    assert set(chosen(plan)) == {"a", "c"}


def test_without_a_hidden_tier() -> None:
    pair = Pair(num_units=24, tiers=(TierSpec(Tier.KV, 2),))
    specs = [make_request(f"r{i}", prompt_len=5 + i) for i in range(6)]
    for spec in specs:
        pair.scheduler.add_request(spec, 0.0)
    outcome = run_until_idle(pair.scheduler, pair.worker)
    assert all(outcome.tokens[spec.request_id] == expected_tokens(spec) for spec in specs)


def test_equal_histories_give_equal_plans() -> None:
    plans = []
    for _ in range(2):
        pair = Pair(num_units=30)
        for i in range(12):
            pair.add(f"r{i}", 0.01 * i, prompt_len=3 + 5 * (i % 4))
        plans.append([pair.step(1.0 + 0.1 * i, 0.05) for i in range(10)])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("seed", range(300))
def test_what_needs_no_knapsack_is_what_it_would_choose(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(1, 8)):
        length = rng.randint(1, 9)
        rows.append(
            Row(
                length,
                length + 1,
                tier=rng.choice((Tier.KV, Tier.HIDDEN)),
                max_num_tokens=rng.choice((20, 29, 50)),
                pending_seconds=rng.choice((0.0, 0.01, 0.2, 2.0)),
                miss_after_seconds=rng.choice((0.1, 10.0)),
            )
        )
    seconds = {Tier.KV: 1e-4, Tier.HIDDEN: rng.choice((1e-4, 1e-3, 1e-2))}
    problem = make_problem(
        rows,
        [Row(0, 90, max_num_tokens=100)] * rng.randint(0, 3),
        num_units=rng.randint(40, 120),
        max_num_batched_tokens=64,
        cost=make_cost(seconds_per_cached_token=seconds),
    )
    direct = apt.AptPolicy().decide(problem)
    monkeypatch.setattr(apt, "_as_they_are", lambda *_: None)
    by_knapsack = apt.AptPolicy().decide(problem)
    assert direct is not None
    assert by_knapsack is not None
    assert direct.reason == by_knapsack.reason
    for name in ("slots", "num_tokens", "tiers", "preempted"):
        assert getattr(direct, name).tolist() == getattr(by_knapsack, name).tolist()
