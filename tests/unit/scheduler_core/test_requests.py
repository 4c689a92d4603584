"""Requests at the door, resumed requests, timings and totals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from aptserve_scheduler.core import (
    DuplicateRequest,
    FinishReason,
    QueueFull,
    RequestFinished,
    RequestTooLarge,
    Scheduler,
    SchedulerConfig,
    Tier,
)
from aptserve_scheduler.core.latency import nearest_rank_p99
from aptserve_scheduler.policies import create_policy
from support.scheduler import (
    WORKER,
    expected_tokens,
    make_request,
    make_rig,
    make_scheduler,
    make_worker,
    run_until_idle,
)


@pytest.mark.parametrize(("policy", "limit"), [("fcfs", 200), ("apt", 400)])
def test_too_large_is_what_the_empty_pool_cannot_hold(policy: str, limit: int) -> None:
    """100 units are 50 blocks of 4 tokens in KV, 100 in hidden."""
    scheduler = make_scheduler(policy)
    scheduler.add_request(make_request("fits", limit - 4, max_tokens=4), 0.0)
    with pytest.raises(RequestTooLarge, match=f"{limit + 1} tokens together.*holds {limit}"):
        scheduler.add_request(make_request("over", limit - 3, max_tokens=4), 0.0)
    assert scheduler.num_requests == 1


def test_the_largest_worker_decides_what_is_too_large() -> None:
    scheduler = make_scheduler()
    spec = make_request("r", 300)
    with pytest.raises(RequestTooLarge):
        scheduler.add_request(spec, 0.0)
    scheduler.add_worker(make_worker("large", num_units=400), 0.0)
    scheduler.add_request(spec, 0.0)
    assert not scheduler.has_work(WORKER)
    assert scheduler.plan(WORKER, 0.0) is None


def test_without_workers_every_size_is_accepted_and_waits() -> None:
    scheduler = Scheduler(SchedulerConfig(), create_policy("fcfs"))
    scheduler.add_request(make_request("r", 10_000), 0.0)
    assert scheduler.fail_unservable(0.0) == []
    scheduler.add_worker(make_worker(), 0.0)
    (event,) = scheduler.fail_unservable(0.0)
    assert isinstance(event, RequestFinished)
    assert event.error is not None
    assert "10004 tokens" in event.error


def test_duplicate_id_is_refused_while_the_first_lives() -> None:
    rig = make_rig()
    rig.add(make_request("r"))
    with pytest.raises(DuplicateRequest, match="'r' is in use"):
        rig.add(make_request("r"))
    rig.plan()
    with pytest.raises(DuplicateRequest):
        rig.add(make_request("r"))
    rig.finish("r", FinishReason.ABORT)
    rig.outcome.finished.clear()
    rig.add(make_request("r"))
    assert rig.scheduler.num_requests == 1


def test_the_queue_is_bounded() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add_request(make_request("a"), 0.0)
    scheduler.add_request(make_request("b"), 0.0)
    with pytest.raises(QueueFull, match="2 requests wait") as caught:
        scheduler.add_request(make_request("c"), 32.0)
    assert caught.value.retry_after_seconds == 2.0  # a sixteenth of the oldest wait
    totals = scheduler.snapshot(32.0).totals
    assert (totals.num_accepted, totals.num_rejected) == (2, 1)
    assert scheduler.plan(WORKER, 32.0) is not None
    scheduler.add_request(make_request("c"), 32.0)


@pytest.mark.parametrize(("waited", "advice"), [(0.0, 0.1), (1000.0, 10.0)])
def test_retry_advice_is_within_bounds(waited: float, advice: float) -> None:
    scheduler = make_scheduler(max_waiting=1)
    scheduler.add_request(make_request("a"), 0.0)
    with pytest.raises(QueueFull) as caught:
        scheduler.add_request(make_request("b"), waited)
    assert caught.value.retry_after_seconds == advice


def test_a_complete_resumed_request_needs_no_place_in_the_queue() -> None:
    scheduler = make_scheduler(max_waiting=1)
    scheduler.add_request(make_request("a"), 0.0)
    done = make_request("done", max_tokens=2, resume=(5, 6))
    (event,) = scheduler.add_request(done, 0.0)
    assert isinstance(event, RequestFinished)
    assert (event.reason, event.num_output_tokens) == (FinishReason.LENGTH, 2)
    assert scheduler.num_requests == 1
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (make_request(prompt_len=0), "the prompt has no token"),
        (make_request(max_tokens=0), "max_tokens is 0"),
    ],
)
def test_impossible_requests_are_refused(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler().add_request(spec, 0.0)  # type: ignore[arg-type]


def test_a_new_sequence_hands_everything_through() -> None:
    rig = make_rig("apt")
    sampling = object()
    rig.add(replace(make_request("r", prompt_len=5, max_tokens=7), sampling=sampling))
    (new,) = rig.plan().new
    assert (new.request_id, list(new.token_ids)) == ("r", [1, 2, 3, 4, 5])
    assert (new.num_prompt_tokens, new.max_tokens, new.tier) == (5, 7, Tier.KV)
    assert new.sampling is sampling


def test_resumed_tokens_are_computed_again_and_not_sent_again() -> None:
    whole = make_request(prompt_len=6, max_tokens=8)
    tokens = expected_tokens(whole)
    rig = make_rig()
    rig.add(make_request(prompt_len=6, max_tokens=8, resume=tokens[:3]))
    plan = rig.plan()
    assert list(plan.new[0].token_ids) == [*whole.prompt_token_ids, *tokens[:3]]
    assert plan.new[0].num_prompt_tokens == 6
    assert plan.scheduled[0].num_new_tokens == 9
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens["r"] == tokens[3:]
    assert outcome.finished["r"].num_output_tokens == 8
    assert rig.scheduler.snapshot(0.0).totals.num_output_tokens == 5


def test_timing_of_a_request_from_arrival_to_end() -> None:
    rig = make_rig()
    rig.add(make_request(max_tokens=3, ttft=2.0, tbt=1.0), now=10.0)
    for now in (11.0, 12.0, 12.5):  # plans; their tokens come at 11.75, 12.25, 12.75
        rig.plan(now)
        rig.answer({11.0: 11.75, 12.0: 12.25, 12.5: 12.75}[now])
    timing = rig.outcome.finished["r"].timing
    assert timing.queued_seconds == 1.0
    assert timing.ttft_seconds == 1.75
    assert timing.tbt_p99_seconds == 0.5
    assert timing.total_seconds == 2.75
    assert timing.objectives_met


@pytest.mark.parametrize(
    ("first_at", "second_at", "met"), [(1.0, 2.0, True), (1.1, 2.0, False), (1.0, 2.1, False)]
)
def test_objectives_are_met_when_first_token_and_gaps_are_in_time(
    first_at: float, second_at: float, met: bool
) -> None:
    rig = make_rig()
    rig.add(make_request(max_tokens=2, ttft=1.0, tbt=1.0))
    for now in (first_at, second_at):
        rig.plan()
        rig.answer(now)
    assert rig.outcome.finished["r"].timing.objectives_met == met
    assert rig.scheduler.snapshot(3.0).totals.num_objectives_met == met


def test_an_aborted_request_has_not_met_its_objectives() -> None:
    rig = make_rig()
    rig.add(make_request())
    rig.plan()
    rig.answer()
    rig.finish("r", FinishReason.ABORT)
    assert not rig.outcome.finished["r"].timing.objectives_met


def test_timing_of_a_request_that_never_ran() -> None:
    rig = make_rig()
    rig.add(make_request(), now=1.0)
    rig.finish("r", FinishReason.ABORT, now=4.0)
    timing = rig.outcome.finished["r"].timing
    assert (timing.queued_seconds, timing.total_seconds) == (3.0, 3.0)
    assert timing.ttft_seconds is None
    assert timing.tbt_p99_seconds is None


@pytest.mark.parametrize(
    ("num_slow", "num_values", "p99"), [(0, 1, 1.0), (1, 99, 9.0), (1, 100, 1.0), (2, 199, 9.0)]
)
def test_p99_by_nearest_rank(num_slow: int, num_values: int, p99: float) -> None:
    assert nearest_rank_p99([9.0] * num_slow + [1.0] * (num_values - num_slow)) == p99


def test_p99_of_nothing() -> None:
    assert nearest_rank_p99([]) is None


def test_snapshot_counts_what_there_is() -> None:
    rig = make_rig(depth=2)
    rig.add(make_request("a", prompt_len=8), make_request("b", prompt_len=5), now=1.0)
    rig.plan(1.0)
    rig.add(make_request("c"), now=2.0)
    snapshot = rig.scheduler.snapshot(5.0)
    assert (snapshot.num_waiting, snapshot.num_running) == (1, 2)
    assert snapshot.oldest_wait_seconds == 3.0
    (worker,) = snapshot.workers
    assert (worker.num_units, worker.num_used_units, worker.num_running) == (100, 8, 2)
    assert (worker.num_plans_in_flight, worker.num_steps) == (1, 0)
    kv, hidden = worker.tiers
    assert (kv.tier, kv.num_used_units, kv.num_sequences) == (Tier.KV, 8, 2)
    assert (hidden.tier, hidden.num_used_units, hidden.num_sequences) == (Tier.HIDDEN, 0, 0)


def test_snapshot_totals_and_that_it_is_a_copy() -> None:
    rig = make_rig()
    before = rig.scheduler.snapshot(0.0)
    specs = [make_request(name, prompt_len=5, max_tokens=2) for name in "abc"]
    rig.add(*specs)
    rig.finish("c", FinishReason.ABORT)
    rig.outcome.note(rig.scheduler.fail(specs[1].request_id, "broken", 0.0))
    run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    totals = rig.scheduler.snapshot(1.0).totals
    assert (totals.num_accepted, totals.num_finished) == (3, 1)
    assert (totals.num_aborted, totals.num_failed) == (1, 1)
    assert (totals.num_prompt_tokens, totals.num_output_tokens) == (15, 2)
    assert totals.num_objectives_met == 1
    assert before.totals.num_accepted == 0


def test_gap_share_leaves_out_the_first_gap() -> None:
    rig = make_rig()
    rig.add(make_request(max_tokens=3))
    for gap in (100.0, 0.01, 0.01):
        rig.plan()
        rig.answer(step_seconds=0.01, gap_seconds=gap)
    (worker,) = rig.scheduler.snapshot(0.0).workers
    assert worker.gap_share == pytest.approx(0.02 / 0.05)


@pytest.mark.parametrize("field", ["pipeline_depth", "max_waiting"])
def test_settings_out_of_range_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        SchedulerConfig(**{field: 0})
