"""Workers that come, go, and answer what they should not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from aptserve_scheduler.core import (
    FinishReason,
    PlanId,
    ProtocolViolation,
    RequestFinished,
    SequenceFailure,
    SequenceId,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
    UnknownWorker,
    WorkerId,
)
from support.scheduler import (
    HIDDEN,
    KV,
    WORKER,
    CheckingWorker,
    Rig,
    expected_tokens,
    make_cost,
    make_request,
    make_rig,
    make_scheduler,
    make_worker,
    run_until_idle,
)


def test_a_lost_worker_gives_its_requests_back_in_order_of_arrival() -> None:
    rig = make_rig(depth=2, max_num_seqs=2)
    rig.add(*(make_request(name) for name in "abcd"))
    rig.plan()
    rig.answer()
    rig.plan()
    assert rig.scheduler.remove_worker(WORKER, 0.0) == []
    rig.scheduler.check_integrity()
    rig.scheduler.add_worker(make_worker("w2", max_num_seqs=4), 0.0)
    plan = rig.scheduler.plan(WorkerId("w2"), 0.0)
    assert plan is not None
    assert [new.request_id for new in plan.new] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("num_answers", [0, 1, 2, 3])
def test_requests_of_a_lost_worker_keep_their_tokens(num_answers: int) -> None:
    rig = make_rig(depth=2)
    specs = [make_request(name, prompt_len=6, max_tokens=6) for name in "ab"]
    rig.add(*specs)
    rig.plan()
    for _ in range(num_answers):
        rig.plan()
        rig.answer()
    rig.scheduler.remove_worker(WORKER, 0.0)
    rig.scheduler.add_worker(make_worker("w2"), 0.0)
    second = CheckingWorker(make_worker("w2"))
    outcome = run_until_idle(rig.scheduler, second, rig.outcome)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}
    assert outcome.finished["a"].timing.num_preemptions == 1


def test_a_worker_that_comes_back_under_its_name_starts_afresh() -> None:
    rig = make_rig(depth=2)
    spec = make_request()
    rig.add(spec)
    rig.plan()
    rig.plan()
    rig.scheduler.remove_worker(WORKER, 0.0)
    rig.scheduler.add_worker(make_worker(), 0.0)
    outcome = run_until_idle(rig.scheduler, CheckingWorker(make_worker()))
    assert outcome.tokens == {"r": expected_tokens(spec)}


def test_a_request_moves_to_a_larger_worker_or_fails_when_that_is_lost() -> None:
    scheduler = make_scheduler()
    scheduler.add_worker(make_worker("large", num_units=400), 0.0)
    scheduler.add_request(make_request("large", prompt_len=300), 0.0)
    scheduler.add_request(make_request("small"), 0.0)
    scheduler.plan(WorkerId("large"), 0.0)
    (event,) = scheduler.remove_worker(WorkerId("large"), 1.0)
    assert isinstance(event, RequestFinished)
    assert (event.request_id, event.reason) == ("large", None)
    assert "304 tokens" in str(event.error)
    assert scheduler.num_requests == 1
    scheduler.check_integrity()


def test_with_the_last_worker_gone_everybody_waits() -> None:
    rig = make_rig()
    rig.add(make_request("r", prompt_len=150))
    rig.plan()
    assert rig.scheduler.remove_worker(WORKER, 0.0) == []
    assert rig.scheduler.snapshot(0.0).num_waiting == 1


def test_two_workers_share_one_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add_worker(make_worker("w2"), 0.0)
    for name in "abc":
        scheduler.add_request(make_request(name), 0.0)
    first = scheduler.plan(WORKER, 0.0)
    second = scheduler.plan(WorkerId("w2"), 0.0)
    assert first is not None
    assert second is not None
    assert [new.request_id for new in first.new] == ["a"]
    assert [new.request_id for new in second.new] == ["b", "c"]
    scheduler.check_integrity()


def test_unknown_workers_are_refused() -> None:
    scheduler = make_scheduler()
    nobody = WorkerId("nobody")
    calls: list[Callable[[], object]] = [
        lambda: scheduler.plan(nobody, 0.0),
        lambda: scheduler.apply(nobody, StepResult(PlanId(1), (), 0.0), 0.0),
        lambda: scheduler.remove_worker(nobody, 0.0),
        lambda: scheduler.take_releases(nobody),
        lambda: scheduler.has_work(nobody),
    ]
    for call in calls:
        with pytest.raises(UnknownWorker, match="'nobody'"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "attached already"),
        ({"worker_id": "x", "num_units": 0}, "num_units must be at least 1, not 0"),
        ({"worker_id": "x", "block_size": 0}, "block_size"),
        ({"worker_id": "x", "max_num_seqs": 0}, "max_num_seqs"),
        ({"worker_id": "x", "max_num_batched_tokens": -1}, "max_num_batched_tokens"),
        ({"worker_id": "x", "tiers": ()}, "tiers must start with KV"),
        ({"worker_id": "x", "tiers": (HIDDEN, KV)}, "tiers must start with KV"),
        ({"worker_id": "x", "tiers": (KV, KV)}, "listed twice"),
        ({"worker_id": "x", "tiers": (TierSpec(Tier.KV, 0),)}, "units_per_block of KV"),
        ({"worker_id": "x", "cost": make_cost(base_seconds=-1.0)}, "finite and >= 0"),
        ({"worker_id": "x", "cost": make_cost(base_seconds=math.nan)}, "finite and >= 0"),
    ],
)
def test_impossible_workers_are_refused(changes: dict[str, object], message: str) -> None:
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.add_worker(make_worker(**changes), 0.0)  # type: ignore[arg-type]
    assert len(scheduler.snapshot(0.0).workers) == 1


def output(sequence_id: int, *token_ids: int, reason: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput(SequenceId(sequence_id), token_ids, reason)


def failure(sequence_id: int) -> SequenceFailure:
    return SequenceFailure(SequenceId(sequence_id), "broken")


WRONG_ANSWERS: dict[str, tuple[dict[str, object], str]] = {
    "another plan": ({"plan_id": PlanId(2)}, "result for plan 2, due is plan 1"),
    "negative time": ({"step_seconds": -1.0}, "step_seconds is -1"),
    "no number": ({"step_seconds": math.nan}, "step_seconds is nan"),
    "endless gap": ({"gap_seconds": math.inf}, "gap_seconds is inf"),
    "stranger": ({"outputs": (output(1, 5), output(2, 5), output(9, 5))}, "no sequence 9"),
    "strange failure": (
        {"failures": (failure(9),)},
        "no sequence 9",
    ),
    "strange skip": ({"skipped": (SequenceId(9),)}, "no sequence 9"),
    "twice": ({"outputs": (output(1, 5), output(1, 5))}, "answered twice"),
    "token and failure": ({"failures": (failure(1),)}, "answered twice"),
    "skips a live one": (
        {"outputs": (output(1, 5),), "skipped": (SequenceId(2),)},
        "has not ended was skipped",
    ),
    "no token": ({"outputs": (output(1, 5),)}, "sequence 2 .* gave no token"),
    "empty output": ({"outputs": (output(1, 5), output(2))}, "sequence 2 gave 0 tokens"),
    "too many": ({"outputs": (output(1, 5), output(2, 5, 5, 5, 5, 5))}, "at most 4 are left"),
    "aborts": (
        {"outputs": (output(1, 5), output(2, 5, reason=FinishReason.ABORT))},
        "aborted by the worker",
    ),
    "too few units": ({"num_free_units": 91}, "uses 9 units, by the plans it has run it is 8"),
    "too many units": ({"num_free_units": 93}, "uses 7 units"),
}


def rig_with_two_running() -> Rig:
    rig = make_rig(depth=2)
    rig.add(make_request("a"), make_request("b"))
    rig.plan()
    return rig


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_wrong_answer_changes_nothing_and_the_worker_can_be_removed(case: str) -> None:
    changes, message = WRONG_ANSWERS[case]
    rig = rig_with_two_running()
    with pytest.raises(ProtocolViolation, match=message):
        rig.answer(**changes)
    rig.scheduler.check_integrity()
    snapshot = rig.scheduler.snapshot(0.0)
    assert snapshot.totals.num_output_tokens == 0
    assert snapshot.workers[0].num_plans_in_flight == 1
    assert rig.scheduler.remove_worker(WORKER, 0.0) == []
    rig.scheduler.check_integrity()
    rig.scheduler.add_worker(make_worker(), 0.0)
    outcome = run_until_idle(rig.scheduler, CheckingWorker(make_worker()))
    for name in "ab":
        assert outcome.tokens[name] == expected_tokens(make_request(name))


def test_an_answer_without_a_plan_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="due is plan none"):
        make_scheduler().apply(WORKER, StepResult(PlanId(1), (), 0.0), 0.0)


def test_a_late_duplicate_is_a_violation() -> None:
    rig = rig_with_two_running()
    result = rig.worker.step()
    rig.scheduler.apply(WORKER, result, 0.0)
    rig.plan()
    with pytest.raises(ProtocolViolation, match="result for plan 1, due is plan 2"):
        rig.scheduler.apply(WORKER, result, 0.0)


def test_a_token_from_the_middle_of_a_prompt_is_a_violation() -> None:
    rig = make_rig(max_num_batched_tokens=8)
    rig.add(make_request(prompt_len=20))
    rig.plan()
    with pytest.raises(ProtocolViolation, match="computed up to token 8 of 20 and gave a token"):
        rig.answer(outputs=(output(1, 5),))


@pytest.mark.parametrize("num_free_units", [92, None])
def test_a_right_or_silent_unit_count_is_accepted(num_free_units: int | None) -> None:
    rig = rig_with_two_running()
    assert len(rig.answer(num_free_units=num_free_units)) == 2


def test_releases_are_told_by_message_when_no_plan_is_due() -> None:
    rig = make_rig()
    rig.add(make_request(max_tokens=1))
    rig.plan()
    rig.answer()
    assert not rig.scheduler.has_work(WORKER)
    rig.worker.release(rig.scheduler.take_releases(WORKER))
    assert rig.worker.sequences == {}
    rig.add(make_request("next", max_tokens=1))
    assert rig.plan().release == ()
    rig.answer()  # the unit count is compared again
