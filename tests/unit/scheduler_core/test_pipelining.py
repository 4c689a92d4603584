"""Plans composed while earlier ones run, and requests that end meanwhile."""

from __future__ import annotations

import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    FinishReason,
    RequestFinished,
    SequenceFailure,
    SequenceId,
    SequenceOutput,
    TokensAppended,
)
from support.scheduler import WORKER, Rig, expected_tokens, make_request, make_rig, run_until_idle


def test_at_depth_1_the_next_plan_waits_for_the_result() -> None:
    rig = make_rig(depth=1)
    rig.add(make_request())
    rig.plan()
    assert rig.try_plan() is None
    rig.answer()
    assert rig.plan().plan_id == 2


def test_at_depth_2_the_next_plan_is_composed_while_one_runs() -> None:
    rig = make_rig(depth=2)
    rig.add(make_request(prompt_len=8))
    first, second = rig.plan(), rig.plan()
    assert (first.plan_id, second.plan_id) == (1, 2)
    assert [new.sequence_id for new in first.new] == [1]
    assert second.new == ()
    # The prompt is tokens [0, 8), what that samples is token 8.
    spans = [(e.num_computed_tokens, e.num_new_tokens) for e in first.scheduled + second.scheduled]
    assert spans == [(0, 8), (8, 1)]
    assert rig.try_plan() is None


@pytest.mark.parametrize(("max_tokens", "num_plans"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_no_plan_is_made_beyond_max_tokens(max_tokens: int, num_plans: int) -> None:
    rig = make_rig(depth=3)
    rig.add(make_request(max_tokens=max_tokens))
    for _ in range(num_plans):
        rig.plan()
    assert rig.try_plan() is None


def test_max_tokens_ends_a_request_even_if_the_worker_does_not_say_so() -> None:
    rig = make_rig()
    rig.add(make_request(max_tokens=1))
    rig.plan()
    events = rig.answer(outputs=(SequenceOutput(SequenceId(1), (5,)),))
    assert events[0] == TokensAppended(make_request().request_id, (5,))
    assert isinstance(events[1], RequestFinished)
    assert events[1].reason is FinishReason.LENGTH


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("policy", ["fcfs", "apt"])
def test_tokens_do_not_depend_on_the_depth(policy: str, depth: int) -> None:
    rig = make_rig(policy, depth, num_units=24)
    specs = [make_request(f"r{i}", prompt_len=3 + 4 * i, max_tokens=1 + 2 * i) for i in range(6)]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


def rig_with_two_plans_in_flight() -> Rig:
    """Request ``r`` (2 blocks, then a third) in two plans under way."""
    rig = make_rig(depth=2)
    rig.add(make_request(max_tokens=10))
    rig.plan()
    rig.plan()
    return rig


def test_end_of_sequence_while_a_later_plan_is_in_flight() -> None:
    rig = rig_with_two_plans_in_flight()
    rig.worker.end_probability = 1.0
    events = rig.answer()
    assert isinstance(events[-1], RequestFinished)
    assert events[-1].reason is FinishReason.STOP
    assert rig.num_used_units == 0
    # The worker still has a plan that names it: no release may overtake that.
    assert rig.scheduler.take_releases(WORKER) == ()
    assert rig.answer() == []  # skipped
    assert rig.worker.num_used_units > 0
    assert rig.scheduler.take_releases(WORKER) == (1,)
    assert rig.scheduler.take_releases(WORKER) == ()


def test_the_next_plan_carries_the_release() -> None:
    rig = rig_with_two_plans_in_flight()
    rig.worker.end_probability = 1.0
    rig.answer()
    rig.worker.end_probability = 0.0
    rig.add(make_request("next"))
    plan = rig.plan()
    assert plan.release == (1,)
    assert [entry.sequence_id for entry in plan.scheduled] == [2]
    rig.answer()
    rig.answer()
    assert set(rig.worker.sequences) == {2}


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
def test_what_plans_in_flight_bring_for_an_ended_request_is_dropped(reason: FinishReason) -> None:
    rig = rig_with_two_plans_in_flight()
    assert [event.request_id for event in rig.finish("r", reason)] == ["r"]
    assert rig.scheduler.num_requests == 0
    assert rig.num_used_units == 0
    assert rig.answer() == []
    assert rig.answer() == []
    assert rig.outcome.finished["r"].reason is reason
    assert rig.outcome.tokens == {}


def test_units_of_an_ended_request_serve_the_next_plan() -> None:
    rig = make_rig(depth=2, num_units=6)
    rig.add(*(make_request(name, prompt_len=10, max_tokens=2) for name in ("old", "new")))
    rig.plan()
    rig.finish("old", FinishReason.ABORT)
    plan = rig.plan()
    assert [entry.request_id for entry in plan.scheduled] == ["new"]
    assert plan.release == (1,)
    rig.answer()
    rig.answer()  # the worker asserts that the pool holds it


def test_an_id_is_free_again_while_its_old_plans_are_in_flight() -> None:
    rig = rig_with_two_plans_in_flight()
    rig.finish("r", FinishReason.ABORT)
    rig.outcome.finished.clear()
    spec = make_request(max_tokens=2)
    rig.add(spec)
    rig.answer()
    assert rig.answer() == []
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {"r": expected_tokens(spec)}


@pytest.mark.parametrize("num_plans", [0, 1, 2])
def test_a_request_can_be_ended_only_once(num_plans: int) -> None:
    rig = make_rig(depth=2)
    rig.add(make_request())
    for _ in range(num_plans):
        rig.plan()
    assert len(rig.finish("r", FinishReason.STOP)) == 1
    assert rig.finish("r", FinishReason.STOP) == []
    assert rig.finish("r", FinishReason.ABORT) == []
    assert rig.scheduler.fail(make_request().request_id, "late", 0.0) == []


def test_unknown_ids_give_no_event() -> None:
    assert make_rig().finish("nobody", FinishReason.ABORT) == []


def test_a_waiting_request_that_is_aborted_never_reaches_a_plan() -> None:
    rig = make_rig()
    rig.add(make_request())
    rig.finish("r", FinishReason.ABORT)
    assert rig.try_plan() is None
    assert not rig.scheduler.has_work(WORKER)
    assert rig.scheduler.take_releases(WORKER) == ()


def test_a_sequence_that_fails_ends_its_request_alone() -> None:
    rig = make_rig(depth=2)
    good = make_request("good")
    rig.add(make_request("bad"), good)
    rig.plan()
    rig.plan()
    result = rig.worker.step()
    rig.worker.sequences[1].ended = True
    events = rig.scheduler.apply(
        WORKER,
        type(result)(
            plan_id=result.plan_id,
            outputs=result.outputs[1:],
            step_seconds=0.01,
            failures=(SequenceFailure(SequenceId(1), "NaN logits"),),
        ),
        0.0,
    )
    rig.outcome.note(events)
    outcome = run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    assert outcome.finished["bad"].error == "NaN logits"
    assert outcome.finished["bad"].reason is None
    assert outcome.tokens == {"good": expected_tokens(good)}


def test_events_come_in_plan_order_tokens_before_the_end() -> None:
    rig = make_rig()
    rig.add(*(make_request(name, max_tokens=1 + (name == "b")) for name in "abc"))
    rig.plan()
    told = [(event.request_id, type(event)) for event in rig.answer()]
    assert told == [
        ("a", TokensAppended),
        ("a", RequestFinished),
        ("b", TokensAppended),
        ("c", TokensAppended),
        ("c", RequestFinished),
    ]


def test_a_preempted_request_comes_back_under_a_new_sequence_id() -> None:
    rig = make_rig(depth=1, num_units=8)
    specs = [make_request(name, prompt_len=7, max_tokens=8) for name in "ab"]
    rig.add(*specs)
    rig.plan()
    rig.answer()
    rig.plan()
    rig.answer()
    plan = rig.plan()  # both need a third block, there is none
    assert plan.preempted == ("b",)
    assert plan.release == (2,)
    outcome = run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}
    assert outcome.finished["b"].timing.num_preemptions == 1
    assert 2 not in rig.worker.sequences


def test_a_preempted_request_waits_until_plans_with_it_are_back() -> None:
    rig = make_rig(depth=2, num_units=8)
    rig.add(*(make_request(name, prompt_len=7, max_tokens=8) for name in "ab"))
    rig.plan()
    rig.plan()
    rig.answer()
    assert rig.plan().preempted == ("b",)
    rig.finish("a", FinishReason.ABORT)
    # All memory is free, but the token that b gets from plan 2 is not known yet.
    rig.answer()
    back = rig.plan()
    assert [new.request_id for new in back.new] == ["b"]
    assert list(back.new[0].token_ids[7:]) == rig.outcome.tokens["b"]
    assert len(rig.outcome.tokens["b"]) == 2


def test_a_prompt_longer_than_the_token_budget_is_computed_in_chunks() -> None:
    rig = make_rig(depth=2, max_num_batched_tokens=16)
    spec = make_request(prompt_len=40)
    rig.add(spec)
    plans: list[BatchPlan] = []
    while len(plans) < 3:
        plans.append(rig.plan())
        if len(plans) > 1:
            assert rig.answer() == []  # no token before the prompt is through
    spans = [(e.num_computed_tokens, e.num_new_tokens) for plan in plans for e in plan.scheduled]
    assert spans == [(0, 16), (16, 16), (32, 8)]
    assert [len(plan.new) for plan in plans] == [1, 0, 0]
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {"r": expected_tokens(spec)}
