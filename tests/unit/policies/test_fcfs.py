"""First come, first served: who is prefilled, who decodes, who gives way."""

from __future__ import annotations

from aptserve_scheduler.core import Scheduler, Tier
from support.scheduler import (
    WORKER,
    CheckingWorker,
    expected_tokens,
    make_request,
    make_scheduler,
    make_worker,
    run_until_idle,
)


def planned(scheduler: Scheduler, now: float = 1.0) -> dict[str, int]:
    """Request ids of the next plan with their token counts."""
    plan = scheduler.plan(WORKER, now)
    assert plan is not None
    return {entry.request_id: entry.num_new_tokens for entry in plan.scheduled}


def answered(scheduler: Scheduler, worker: CheckingWorker, now: float = 1.0) -> dict[str, int]:
    """The next plan like :func:`planned`, run and answered too."""
    plan = scheduler.plan(WORKER, now)
    assert plan is not None
    worker.receive(plan)
    scheduler.apply(WORKER, worker.step(), now)
    return {entry.request_id: entry.num_new_tokens for entry in plan.scheduled}


def test_prompts_in_arrival_order_up_to_the_token_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    for name, length in (("a", 8), ("b", 8), ("c", 8), ("d", 2)):
        scheduler.add_request(make_request(name, length), 0.0)
    # d would fit behind c, but c is first.
    assert planned(scheduler) == {"a": 8, "b": 8}


def test_prompts_up_to_the_seats() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(make_request(name), 0.0)
    assert planned(scheduler) == {"a": 8, "b": 8}


def test_prefill_comes_before_decode() -> None:
    scheduler, worker = make_scheduler(), CheckingWorker(make_worker())
    scheduler.add_request(make_request("a"), 0.0)
    assert answered(scheduler, worker) == {"a": 8}
    scheduler.add_request(make_request("b"), 0.0)
    assert answered(scheduler, worker) == {"b": 8}
    assert answered(scheduler, worker) == {"a": 1, "b": 1}


def test_admission_leaves_one_percent_free_while_others_run() -> None:
    size = {"num_units": 200, "max_num_batched_tokens": 1000}
    scheduler, worker = make_scheduler(**size), CheckingWorker(make_worker(**size))
    scheduler.add_request(make_request("a", prompt_len=4), 0.0)  # 2 units
    answered(scheduler, worker)
    # 99 blocks would take the rest of the pool, of which 2 units stay free.
    scheduler.add_request(make_request("b", prompt_len=4 * 98 + 1, max_tokens=1), 0.0)
    assert answered(scheduler, worker) == {"a": 1}


def test_watermark_is_waived_for_a_request_that_takes_the_whole_pool() -> None:
    size = {"num_units": 200, "max_num_batched_tokens": 1000}
    scheduler, worker = make_scheduler(**size), CheckingWorker(make_worker(**size))
    spec = make_request("a", prompt_len=396, max_tokens=4)
    scheduler.add_request(spec, 0.0)
    assert run_until_idle(scheduler, worker).tokens["a"] == expected_tokens(spec)


def test_latest_arrival_gives_way_to_decodes() -> None:
    size = {"num_units": 12}
    scheduler, worker = make_scheduler(**size), CheckingWorker(make_worker(**size))
    for name in "abc":
        scheduler.add_request(make_request(name, prompt_len=7, max_tokens=10), 0.0)
    assert answered(scheduler, worker) == {"a": 7, "b": 7, "c": 7}
    assert answered(scheduler, worker) == {"a": 1, "b": 1, "c": 1}
    plan = scheduler.plan(WORKER, 1.0)
    assert plan is not None
    assert [entry.request_id for entry in plan.scheduled] == ["a", "b"]
    assert plan.preempted == ("c",)
    assert len(plan.release) == 1


def test_caches_are_kv_only() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request(), 0.0)
    plan = scheduler.plan(WORKER, 1.0)
    assert plan is not None
    assert plan.new[0].tier is Tier.KV


def test_a_prompt_longer_than_the_budget_goes_in_chunks() -> None:
    size = {"max_num_batched_tokens": 16}
    scheduler, worker = make_scheduler(**size), CheckingWorker(make_worker(**size))
    scheduler.add_request(make_request("long", prompt_len=40), 0.0)
    scheduler.add_request(make_request("short", prompt_len=8), 0.0)
    assert answered(scheduler, worker) == {"long": 16}
    assert answered(scheduler, worker) == {"long": 16}
    assert answered(scheduler, worker) == {"long": 8, "short": 8}
    assert answered(scheduler, worker) == {"long": 1, "short": 1}


def test_reason_has_numbers() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request(), 0.0)
    plan = scheduler.plan(WORKER, 1.0)
    assert plan is not None
    assert plan.reason.startswith("prefill: first 1 of 1 waiting requests")
