"""What becomes of a policy's decision: promotions, and decisions that break a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from aptserve_scheduler.core import (
    FinishReason,
    IntegrityError,
    PolicyError,
    Scheduler,
    SequenceId,
    SequenceOutput,
    Tier,
    TierSpec,
)
from aptserve_scheduler.policies import BatchProblem, Decision, Policy
from support.scheduler import (
    KV,
    WORKER,
    Rig,
    expected_tokens,
    make_request,
    make_rig,
    run_until_idle,
)


@dataclass
class ScriptedPolicy(Policy):
    """Runs all it is shown to the end of what is known, in one tier, with a last change."""

    tier: Tier = Tier.KV
    change: Callable[[BatchProblem, Decision], Decision] = lambda _, decision: decision
    scripted: Decision | None = None
    name: str = "scripted"

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        return tiers

    def decide(self, problem: BatchProblem) -> Decision | None:
        if self.scripted is not None:
            return self.scripted
        running, waiting = problem.running, problem.waiting
        on = running.schedulable
        slots = np.concatenate([running.slots[on], waiting.slots])
        if not len(slots):
            return None
        remaining = [running.num_remaining_tokens[on], waiting.num_remaining_tokens]
        decision = Decision(
            slots=slots,
            num_tokens=np.concatenate(remaining),
            tiers=np.full(len(slots), self.tier, np.int8),
            reason="scripted",
        )
        return self.change(problem, decision)


def hidden_rig(depth: int = 1) -> tuple[Rig, ScriptedPolicy]:
    """A request of 8 tokens, prefilled into hidden; later plans use KV."""
    policy = ScriptedPolicy(Tier.HIDDEN)
    rig = make_rig(policy, depth)
    rig.add(make_request(max_tokens=6))
    rig.plan()
    policy.tier = Tier.KV
    return rig, policy


def test_a_promotion_is_told_and_counted() -> None:
    rig, _ = hidden_rig()
    assert rig.num_used_units == 2  # 2 blocks
    rig.answer()
    plan = rig.plan()
    assert (plan.promote, plan.promoted, plan.new) == ((1,), ("r",), ())
    assert plan.num_used_units == rig.num_used_units == 6  # 3 blocks, 2 units each
    rig.answer()
    assert rig.worker.num_used_units == 6
    outcome = run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    assert outcome.tokens == {"r": expected_tokens(make_request(max_tokens=6))}
    assert rig.scheduler.snapshot(0.0).totals.num_promotions == 1


@pytest.mark.parametrize("promotes_ended", [False, True])
def test_a_promotion_of_a_sequence_that_ended_may_be_done_or_not(promotes_ended: bool) -> None:
    rig, _ = hidden_rig(depth=3)
    rig.worker.promotes_ended = promotes_ended
    rig.plan()
    rig.plan()
    rig.worker.end_probability = 1.0
    rig.answer()
    assert rig.num_used_units == 0
    rig.worker.end_probability = 0.0
    rig.answer()
    rig.answer()
    assert rig.worker.num_used_units == (4 if promotes_ended else 2)
    rig.add(make_request("next", max_tokens=1))
    rig.plan()
    rig.answer()
    rig.worker.release(rig.scheduler.take_releases(WORKER))
    assert rig.worker.num_used_units == 0


def test_a_promotion_in_a_plan_of_an_aborted_request_is_counted_out() -> None:
    rig, _ = hidden_rig(depth=2)
    rig.plan()
    rig.finish("r", FinishReason.ABORT)
    rig.answer()
    rig.answer()
    rig.add(make_request("next", max_tokens=1))
    assert rig.plan().release == (1,)
    rig.answer()
    assert rig.worker.num_used_units == 4


def everything(field: str, value: object) -> Callable[[BatchProblem, Decision], Decision]:
    """Replace all entries of an array."""

    def change(_: BatchProblem, decision: Decision) -> Decision:
        array = getattr(decision, field)
        return replace(decision, **{field: np.full_like(array, value)})

    return change


def preempting(*slots: int) -> Callable[[BatchProblem, Decision], Decision]:
    return lambda _, decision: replace(decision, preempted=np.array(slots, np.int64))


BROKEN: dict[str, tuple[Callable[[BatchProblem, Decision], Decision], str]] = {
    "nobody": (
        lambda _, d: replace(d, slots=d.slots[:0], num_tokens=d.slots[:0], tiers=d.tiers[:0]),
        "0 requests chosen",
    ),
    "lengths": (lambda _, d: replace(d, num_tokens=d.num_tokens[:1]), "2 requests chosen with 1"),
    "a stranger": (everything("slots", 99_999), "do not all exist"),
    "a negative slot": (everything("slots", -1), "do not all exist"),
    "a free slot": (lambda _, d: replace(d, slots=d.slots + 100), "no candidate"),
    "twice": (everything("slots", 0), "named twice"),
    "no token": (everything("num_tokens", 0), "no token or more than it has left"),
    "too many tokens": (everything("num_tokens", 9), "no token or more than it has left"),
    "beyond the batch": (everything("num_tokens", 40), "80 tokens chosen, the limit is 64"),
    "no tier": (everything("tiers", 0), "a tier is chosen that the worker lacks"),
    "a tier it lacks": (everything("tiers", 7), "a tier is chosen that the worker lacks"),
    "preempts a free slot": (preempting(5), "no candidate"),
    "preempts a waiting one": (
        lambda _, d: replace(
            d,
            slots=d.slots[:1],
            num_tokens=d.num_tokens[:1],
            tiers=d.tiers[:1],
            preempted=d.slots[1:],
        ),
        "no candidate",
    ),
    "preempts the chosen": (preempting(0), "named twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_decision_that_breaks_a_limit_changes_nothing(case: str) -> None:
    change, message = BROKEN[case]
    policy = ScriptedPolicy(change=change)
    rig = make_rig(policy)
    specs = [make_request(name) for name in "ab"]
    rig.add(*specs)
    before = rig.scheduler.snapshot(0.0)
    with pytest.raises(PolicyError, match=message):
        rig.try_plan()
    rig.scheduler.check_integrity()
    assert rig.scheduler.snapshot(0.0) == before
    policy.change = lambda _, decision: decision
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


def refused(rig: Rig, message: str) -> None:
    """The next plan is refused and the books are in order."""
    with pytest.raises(PolicyError, match=message):
        rig.try_plan()
    rig.scheduler.check_integrity()


def test_too_many_requests_are_refused() -> None:
    policy = ScriptedPolicy()
    rig = make_rig(policy, max_num_seqs=1)
    rig.add(make_request("a"), make_request("b"))
    refused(rig, "2 requests chosen, the limit is 1")


def test_more_residents_than_the_worker_has_rows_are_refused() -> None:
    """Those who sit out hold a row too; whoever is preempted gives it up for the same plan."""
    policy = ScriptedPolicy()
    rig = make_rig(policy, max_num_seqs=2)
    rig.add(make_request("a"), make_request("b"))
    rig.plan()
    rig.answer()
    rig.add(make_request("c"))
    new_alone = Decision(np.array([2]), np.array([8]), np.array([Tier.KV], np.int8), "new alone")
    policy.scripted = new_alone
    refused(rig, "3 requests would hold memory with 1 new ones, the limit is 2")
    policy.scripted = replace(new_alone, preempted=np.array([1]))
    assert [entry.request_id for entry in rig.plan().scheduled] == ["c"]
    rig.answer()


def test_more_units_than_there_are_is_refused() -> None:
    policy = ScriptedPolicy()
    rig = make_rig(policy, num_units=7)
    rig.add(make_request("a"), make_request("b"))
    refused(rig, "needs 8 units, 7 are free and preemption gives 0")


def test_kv_to_hidden_is_refused() -> None:
    policy = ScriptedPolicy(Tier.KV)
    rig = make_rig(policy, depth=2)
    rig.add(make_request())
    rig.plan()
    policy.tier = Tier.HIDDEN
    refused(rig, "cannot change to")


def test_a_tier_that_the_worker_has_not_is_refused() -> None:
    policy = ScriptedPolicy(Tier.HIDDEN)
    rig = make_rig(policy, tiers=(KV,))
    rig.add(make_request())
    refused(rig, "a tier is chosen that the worker lacks")


def test_going_on_after_the_last_token_is_refused() -> None:
    policy = ScriptedPolicy()
    rig = make_rig(policy, depth=2)
    rig.add(make_request(max_tokens=1))
    rig.plan()
    policy.scripted = Decision(
        np.array([0]), np.array([1]), np.array([Tier.KV], np.int8), "on and on"
    )
    refused(rig, "whose end is in flight")


def test_several_tokens_of_a_step_are_taken_in() -> None:
    """A worker may give more than one token a step when no later plan counts on one."""
    rig = make_rig()
    rig.add(make_request(max_tokens=4))
    rig.plan()
    outputs = (SequenceOutput(SequenceId(1), (5, 6, 7)),)
    rig.answer(outputs=outputs)
    (entry,) = rig.plan().scheduled
    assert (entry.num_computed_tokens, entry.num_new_tokens) == (8, 3)


def broken_books(scheduler: Scheduler) -> list[Callable[[], None]]:
    """Ways to spoil the state of a scheduler with one running and one waiting request."""
    state = scheduler._state
    table, worker = state.table, state.worker(WORKER)

    def spoil(name: str, slot: int) -> Callable[[], None]:
        return lambda: np.add.at(getattr(table, name), [slot], 1)

    return [
        lambda: worker.ledger.take(1),
        lambda: worker.running.clear(),
        lambda: state.waiting.clear(),
        lambda: worker.in_flight.clear(),
        lambda: table.slot_of.clear(),
        *(spoil(name, 0) for name in ("units", "num_computed", "num_known", "in_flight", "order")),
        *(spoil(name, 1) for name in ("units", "status", "num_computed")),
    ]


@pytest.mark.parametrize("way", range(13))
def test_the_recount_finds_spoiled_books(way: int) -> None:
    rig = make_rig(max_num_seqs=1)
    rig.add(make_request("runs"), make_request("waits"))
    rig.plan()
    ways = broken_books(rig.scheduler)
    assert len(ways) == 13
    ways[way]()
    with pytest.raises(IntegrityError):
        rig.scheduler.check_integrity()
