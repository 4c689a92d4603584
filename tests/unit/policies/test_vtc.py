"""Fairness among tenants: counters, lifts, and what is remembered of whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import FinishReason, RequestId
from aptserve_scheduler.policies.base import Arrival, Service
from aptserve_scheduler.policies.vtc import VtcConfig, VtcPolicy
from support.problems import Row, make_problem
from support.scheduler import Rig, expected_tokens, make_request, make_rig, run_until_idle

WIDE = {"num_units": 1000, "max_num_batched_tokens": 64, "max_num_seqs": 16}


class Tenants:
    """A policy and the requests announced to it, by slot."""

    def __init__(self, **config: object) -> None:
        self.policy = VtcPolicy(VtcConfig(**config))  # type: ignore[arg-type]

    def arrive(self, *tenants: str, first_slot: int = 0) -> None:
        for slot, tenant in enumerate(tenants, first_slot):
            self.policy.arrived(Arrival(slot, 0.0, tenant, 0, 8, 0, 20, None))

    def serve(self, slot: int, num_output: int) -> None:
        tokens = np.array([num_output])
        self.policy.served(Service(np.array([slot]), tokens, tokens, 0.01, 0.5))

    def end(self, slot: int) -> None:
        self.policy.ended(slot, 1, completed=True)

    def batch(
        self, running: list[Row], waiting: list[Row] | None = None, **changes: object
    ) -> list[int]:
        """Slots in batch order."""
        decision = self.policy.decide(make_problem(running, waiting, **{**WIDE, **changes}))
        assert decision is not None
        return decision.slots.tolist()

    def counters(self, *tenants: str) -> list[float | None]:
        return [self.policy.counter_of(tenant) for tenant in tenants]


PROMPT = Row(0, 8)
DECODE = Row(8, 9, num_output_tokens=1)


def test_turns_go_to_the_smallest_counter_each_charged_as_it_starts() -> None:
    tenants = Tenants()
    tenants.arrive("a", "a", "a", "b", "b", "c")
    waiting = [Row(0, n) for n in (8, 8, 8, 5, 5, 30)]
    # a: 8; b: 5, c: 30, then b: 10, a: 16, a: 24; equal counters go by arrival
    assert tenants.batch([], waiting) == [0, 3, 5, 4, 1, 2]
    assert tenants.counters("a", "b", "c") == [24.0, 10.0, 30.0]


def test_only_those_who_start_are_charged() -> None:
    tenants = Tenants(token_budget=12)
    tenants.arrive("a", "a", "b")
    assert tenants.batch([], [PROMPT] * 3) == [0, 2]  # b in two chunks
    assert tenants.counters("a", "b") == [8.0, 8.0]


def test_output_is_charged_as_it_comes() -> None:
    tenants = Tenants()
    tenants.arrive("a", "b", "a", "b")
    tenants.batch([], [PROMPT] * 2)
    tenants.serve(0, 5)
    assert tenants.counters("a", "b") == [18.0, 8.0]
    assert tenants.batch([DECODE] * 2, [PROMPT] * 2) == [0, 1, 3, 2]


def test_weights() -> None:
    tenants = Tenants(input_weight=3.0, output_weight=0.5)
    tenants.arrive("a")
    tenants.batch([], [PROMPT])
    tenants.serve(0, 4)
    assert tenants.counters("a") == [26.0]


def test_a_tenant_that_comes_back_is_lifted_to_the_least_of_those_who_wait() -> None:
    tenants = Tenants()
    tenants.arrive("a", "b", "a", "b")
    tenants.batch([], [PROMPT] * 2, max_num_seqs=2)
    tenants.serve(0, 10)
    tenants.serve(1, 20)
    tenants.arrive("c", first_slot=4)
    assert tenants.counters("a", "b", "c") == [28.0, 48.0, 28.0]


def test_one_that_used_more_is_not_brought_down() -> None:
    tenants = Tenants()
    tenants.arrive("a")
    tenants.batch([], [PROMPT])
    tenants.serve(0, 10)
    tenants.arrive("b", "a", first_slot=1)
    assert tenants.counters("a", "b") == [28.0, 28.0]
    tenants.serve(0, 1)
    tenants.arrive("c", first_slot=3)
    assert tenants.counters("a", "c") == [30.0, 28.0]


def test_when_nobody_waits_the_last_who_did_sets_the_level() -> None:
    tenants = Tenants()
    tenants.arrive("a")
    tenants.batch([], [PROMPT])
    tenants.serve(0, 10)
    tenants.end(0)
    tenants.arrive("b")
    assert tenants.counters("b") == [28.0]


def test_a_request_that_waits_for_its_turn_is_not_lifted_again() -> None:
    tenants = Tenants()
    tenants.arrive("a", "a", "b")
    tenants.batch([], [PROMPT], max_num_seqs=1)
    tenants.serve(0, 100)  # a: 208, and still waiting; b: 0
    tenants.arrive("b", first_slot=3)
    assert tenants.counters("a", "b") == [208.0, 0.0]


def test_recomputing_is_not_charged() -> None:
    tenants = Tenants()
    tenants.arrive("a", "a")
    tenants.batch([], [Row(0, 14), Row(0, 14)], num_units=58)
    assert tenants.counters("a") == [28.0]
    grown = [Row(14, 15, num_output_tokens=1), Row(14, 15, num_output_tokens=1)]
    assert tenants.batch(grown, num_units=58) == [0]  # the latest gives way
    lost = Row(0, 15, num_output_tokens=1)
    assert tenants.batch([Row(15, 16, num_output_tokens=2)], [lost], num_units=80) == [0, 1]
    assert tenants.counters("a") == [28.0]


def test_idle_tenants_beyond_the_limit_are_forgotten_longest_idle_first() -> None:
    tenants = Tenants(max_idle_tenants=2)
    tenants.arrive("busy", "a", "b", "c")
    tenants.batch([], [PROMPT] * 4)
    for slot in (1, 2, 3):
        tenants.end(slot)
    assert tenants.counters("busy", "a", "b", "c") == [8.0, None, 8.0, 8.0]
    tenants.arrive("b", first_slot=1)  # not idle any more
    tenants.arrive("d", first_slot=2)
    tenants.end(2)
    assert tenants.counters("busy", "b", "c", "d") == [8.0, 8.0, 8.0, 8.0]


def test_names_without_end_do_not_pile_up() -> None:
    tenants = Tenants(max_idle_tenants=10)
    for number in range(1000):
        tenants.arrive(f"tenant {number}")
        tenants.batch([], [PROMPT])
        tenants.end(0)
    known = [tenants.policy.counter_of(f"tenant {number}") for number in range(1000)]
    assert sum(counter is not None for counter in known) == 10
    assert len(tenants.policy._tenants.counters) <= 32
    assert known[-1] == 8000.0


def test_a_tenant_that_floods_the_queue_does_not_delay_the_others() -> None:
    rig = make_rig("vtc", num_units=400, max_num_seqs=4)
    flood = [replace(make_request(f"f{i}", 20, 10), tenant="flood") for i in range(40)]
    rig.add(*flood)
    for _ in range(12):
        step(rig)
    lone = [replace(make_request(f"l{i}", 20, 10), tenant="lone") for i in range(4)]
    rig.add(*lone)
    while not all(spec.request_id in rig.outcome.finished for spec in lone):
        step(rig)
    num_done = sum(spec.request_id in rig.outcome.finished for spec in flood)
    assert num_done <= 14  # those before the others came, and as many as they had


def step(rig: Rig) -> None:
    rig.plan()
    rig.answer()


def test_equal_demand_gets_equal_service() -> None:
    """One tenant sends long prompts for short answers, the other the reverse."""
    rig = make_rig("vtc", num_units=100, max_num_seqs=3)
    for i in range(30):
        rig.add(replace(make_request(f"a{i}", 40, 5), tenant="a"))
        rig.add(replace(make_request(f"b{i}", 6, 22), tenant="b"))
    for _ in range(150):
        step(rig)
    policy = rig.scheduler.policy
    assert isinstance(policy, VtcPolicy)
    a, b = policy.counter_of("a"), policy.counter_of("b")
    assert a is not None
    assert b is not None
    assert abs(a - b) <= 50 * 3  # a request in each seat


def test_requests_that_go_while_they_wait_leave_nothing_behind() -> None:
    rig = make_rig("vtc")
    rig.add(*[replace(make_request(f"r{i}"), tenant=f"t{i % 3}") for i in range(9)])
    rig.plan()
    for i in range(9):
        rig.finish(RequestId(f"r{i}"), FinishReason.ABORT)
    rig.answer()
    policy = rig.scheduler.policy
    assert isinstance(policy, VtcPolicy)
    assert not policy._waits.any()
    assert not policy._tenant.any()
    assert policy._tenants._num_live[1:] == [0, 0, 0]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_units", [20, 24, 60])
def test_short_memory_loses_no_request(num_units: int, depth: int) -> None:
    rig = make_rig("vtc", depth, num_units=num_units, max_num_batched_tokens=5, max_num_seqs=3)
    specs = [
        replace(make_request(f"r{i}", prompt_len=2 + 5 * i, max_tokens=14 - i), tenant="ab"[i % 2])
        for i in range(7)
    ]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


@pytest.mark.parametrize(
    "field",
    [{"input_weight": 0.0}, {"output_weight": 0}, {"token_budget": 0}, {"max_idle_tenants": 0}],
)
def test_bad_settings_are_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        VtcConfig(**field)  # type: ignore[arg-type]
