"""The feedback queue: where requests join and when they move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, RequestSpec, Tier
from aptserve_scheduler.policies.base import Arrival, Service
from aptserve_scheduler.policies.mlfq import MlfqConfig, MlfqPolicy
from support.problems import Row, make_problem
from support.scheduler import expected_tokens, make_request, make_rig, run_until_idle

WIDE = {"num_units": 1000, "max_num_batched_tokens": 64}
ONE_MS_PER_TOKEN = CostCoefficients(0.0, 1e-3, 0.0, 0.0, {Tier.KV: 0.0})


class Queues:
    """A policy beside one worker, told by hand what was served."""

    def __init__(self, **config: object) -> None:
        self.policy = MlfqPolicy(MlfqConfig(**config))  # type: ignore[arg-type]

    def arrive(self, *slots: int) -> None:
        for slot in slots:
            self.policy.arrived(Arrival(slot, 0.0, "", 0, 8, 0, 20, None))

    def serve(self, slot: int, seconds: float, now: float = 0.5, num_output: int = 1) -> None:
        one = np.array([slot])
        self.policy.served(Service(one, np.array([1]), np.array([num_output]), seconds, now))

    def order(
        self,
        running: list[Row],
        waiting: list[Row] | None = None,
        now: float = 0.5,
        **changes: object,
    ) -> list[int]:
        """Slots in batch order when there is room for all."""
        fields = {**WIDE, "max_num_batched_tokens": 1000, "cost": ONE_MS_PER_TOKEN, **changes}
        decision = self.policy.decide(make_problem(running, waiting, now=now, **fields))
        assert decision is not None
        return decision.slots.tolist()


def waiting_row(num_tokens: int, age: float = 0.5, priority: int = 0) -> Row:
    return Row(0, num_tokens, pending_seconds=age, age_seconds=age, priority=priority)


def running_row(age: float = 0.5) -> Row:
    return Row(4, 5, pending_seconds=0.0, age_seconds=age)


def test_a_request_joins_the_first_queue_that_covers_its_prefill() -> None:
    queues = Queues()
    queues.arrive(0, 1, 2, 3)
    # 41 ms, 40 ms, 11 ms and 10 ms: queues 3, 2, 1 and 0
    assert queues.order([], [waiting_row(n) for n in (41, 40, 11, 10)]) == [3, 2, 1, 0]


def test_within_a_queue_by_arrival() -> None:
    queues = Queues()
    queues.arrive(0, 1, 2)
    rows = [waiting_row(16, age=0.9), waiting_row(20, age=0.7)]
    assert queues.order([running_row(age=0.8)], rows) == [0, 1, 2]  # one token: queue 0
    queues.serve(0, 0.01)
    assert queues.order([running_row(age=0.8)], rows) == [1, 0, 2]


def test_a_used_up_quantum_demotes() -> None:
    queues = Queues()
    queues.arrive(0, 1)
    rows = [running_row(), running_row()]
    assert queues.order(rows) == [0, 1]
    queues.serve(0, 0.009)
    assert queues.order(rows) == [0, 1]
    queues.serve(0, 0.001)
    assert queues.order(rows) == [1, 0]
    queues.serve(1, 0.029)  # queue 1, like the other, until 10 + 20 ms are used
    assert queues.order(rows) == [0, 1]
    queues.serve(0, 0.020)
    assert queues.order(rows) == [1, 0]


def test_a_run_of_iterations_counts_like_one_after_the_other() -> None:
    singly, at_once = Queues(), Queues()
    for queues in (singly, at_once):
        queues.arrive(0, 1)
        queues.order([running_row(), running_row()])
        queues.serve(1, 0.15)
    for _ in range(7):
        singly.serve(0, 0.01)
    at_once.serve(0, 0.07)
    assert singly.order([running_row()] * 2) == at_once.order([running_row()] * 2) == [0, 1]
    singly.serve(0, 0.08)
    at_once.serve(0, 0.08)
    assert singly.order([running_row()] * 2) == at_once.order([running_row()] * 2) == [0, 1]


def test_a_demotion_waits_for_the_token_under_way() -> None:
    queues = Queues()
    queues.arrive(0, 1)
    rows = [running_row(), running_row()]
    queues.order(rows)
    queues.serve(0, 0.1, num_output=0)
    assert queues.order(rows) == [0, 1]
    queues.serve(0, 0.001, num_output=1)
    assert queues.order(rows) == [1, 0]


def test_three_seconds_without_service_lead_to_the_top() -> None:
    queues = Queues()
    queues.arrive(0, 1)
    rows = [running_row(age=9.0), running_row(age=2.0)]
    queues.order(rows)
    queues.serve(0, 0.1, now=1.0)  # queue 3
    queues.serve(1, 0.001, now=3.9)
    assert queues.order(rows, now=3.9) == [1, 0]
    assert queues.order(rows, now=4.0) == [0, 1]


def test_a_promotion_brings_along_the_quantum_of_the_queue_left() -> None:
    queues = Queues()
    queues.arrive(0, 1, 2)
    rows = [running_row(age=9.0), running_row(age=8.0), running_row(age=7.0)]
    queues.order(rows)
    queues.serve(0, 0.1, now=1.0)  # queue 3 of 80 ms
    queues.serve(1, 0.3, now=3.9)  # queue 4
    queues.serve(2, 0.2, now=3.9)  # queue 4
    assert queues.order(rows, now=4.0) == [0, 1, 2]
    queues.serve(0, 0.079, now=4.1)
    assert queues.order(rows, now=4.1) == [0, 1, 2]
    queues.serve(2, 0.001, now=4.2)
    queues.serve(0, 0.001, now=4.2)  # on to queue 4
    queues.serve(1, 0.1, now=4.2)  # queue 5
    assert queues.order(rows, now=4.2) == [0, 2, 1]
    queues.serve(0, 0.16, now=4.3)  # queue 5 too
    assert queues.order(rows, now=4.3) == [2, 0, 1]


def test_a_priority_joins_further_up() -> None:
    queues = Queues()
    queues.arrive(0, 1, 2)
    rows = [waiting_row(20), waiting_row(80, priority=3), waiting_row(5, priority=-2)]
    assert queues.order([], rows) == [1, 0, 2]  # queues 0, 1 and 2


def test_a_slot_is_as_new_when_it_is_used_again() -> None:
    queues = Queues()
    queues.arrive(0, 1)
    queues.order([running_row()] * 2)
    queues.serve(0, 1.0)
    queues.arrive(0)
    assert queues.order([running_row()] * 2) == [0, 1]


def test_a_worker_that_advertises_no_cost_leaves_all_at_the_top() -> None:
    queues = Queues()
    queues.arrive(0, 1)
    free = CostCoefficients(0.0, 0.0, 0.0, 0.0)
    assert queues.order([], [waiting_row(20), waiting_row(5)], cost=free) == [0, 1]


@pytest.mark.parametrize(
    "field", [{"quantum_seconds": 0.0}, {"starving_seconds": -1.0}, {"num_queues": 0}]
)
def test_bad_settings_are_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        MlfqConfig(**field)  # type: ignore[arg-type]


def specs() -> list[RequestSpec]:
    return [
        replace(make_request(f"r{i}", prompt_len=2 + 5 * i, max_tokens=14 - i), priority=i % 3 - 1)
        for i in range(7)
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_units", [20, 24, 60])
def test_short_memory_loses_no_request(num_units: int, depth: int) -> None:
    rig = make_rig("mlfq", depth, num_units=num_units, max_num_batched_tokens=5, max_num_seqs=3)
    rig.add(*specs())
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs()}


def test_two_requests_that_each_need_the_whole_pool_both_end() -> None:
    """Prefills longer than the time after which a request is promoted do not undo one another."""
    policy = MlfqPolicy(MlfqConfig(starving_seconds=0.03))
    rig = make_rig(policy, num_units=24, max_num_batched_tokens=4)
    pair = [make_request(name, prompt_len=30, max_tokens=18) for name in "ab"]
    rig.add(*pair)
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in pair}
