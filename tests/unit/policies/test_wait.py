"""Who is held back and for how long, where answers pause, and the thresholds behind both."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.base import THIS_ITERATION, Arrival, Horizon
from aptserve_scheduler.policies.flow import Flow, class_of
from aptserve_scheduler.policies.wait import GATES, WaitConfig, WaitPolicy
from support.problems import Row, make_problem
from support.scheduler import expected_tokens, make_request, make_rig, run_until_idle

# An iteration takes 1 s, whatever is in it.
COST = CostCoefficients(1.0, 0.0, 0.0, 0.0, {Tier.KV: 0.0, Tier.HIDDEN: 0.0})
WIDE = {
    "num_units": 10**6,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 10**4,
    "cost": COST,
    "now": 0.0,
}
DECODE = Row(8, 9, num_output_tokens=1, max_num_tokens=99)
PROMPT = Row(0, 8, pending_seconds=0.0, ttft_seconds=40.0)


class Requests:
    """A policy and requests announced to it at time 0, by slot.

    The window is 10 s, so ten requests of a class arrive at 1 per second.
    """

    def __init__(self, **config: object) -> None:
        self.policy = WaitPolicy(WaitConfig(**{"window_seconds": 10.0, **config}))  # type: ignore[arg-type]

    def arrive(
        self, first_slot: int, num: int, num_prompt: int = 8, guess: int | None = None
    ) -> None:
        for slot in range(first_slot, first_slot + num):
            self.policy.arrived(Arrival(slot, 0.0, "", 0, num_prompt, 0, 20, guess))

    def complete(self, first_slot: int, *lengths: int) -> None:
        for slot, length in enumerate(lengths, first_slot):
            self.policy.ended(slot, length, completed=True)

    def decide(
        self, running: list[Row], waiting: list[Row] | None = None, **changes: object
    ) -> Decision:
        decision = self.policy.decide(make_problem(running, waiting, **{**WIDE, **changes}))
        assert decision is not None
        return decision

    def batch(
        self, running: list[Row], waiting: list[Row] | None = None, **changes: object
    ) -> list[int]:
        return self.decide(running, waiting, **changes).slots.tolist()


def some_flow(now: float = 0.0, *, guess: int | None = None) -> Requests:
    """Slot 0 runs; of 40 arrivals at time 0, four per second, the others wait."""
    requests = Requests()
    requests.arrive(0, 40, guess=guess)
    return requests


# Starting


def test_a_class_starts_when_as_many_wait_as_arrive_in_an_iteration() -> None:
    requests = some_flow()
    held = requests.decide([DECODE], [PROMPT] * 3)
    assert held.slots.tolist() == [0]
    assert held.reason.endswith("3 are held back, 0 pause")
    assert requests.batch([DECODE], [PROMPT] * 4) == [0, 1, 2, 3, 4]


def test_classes_are_held_back_apart() -> None:
    requests = Requests()
    requests.arrive(0, 20)  # 2 per second
    requests.arrive(20, 20, num_prompt=300)
    requests.arrive(40, 20, guess=100)
    requests.arrive(1, 1)
    requests.arrive(2, 1, guess=100)
    requests.arrive(3, 2, num_prompt=300)
    waiting = [PROMPT, PROMPT, Row(0, 300, max_num_tokens=400), Row(0, 300, max_num_tokens=400)]
    # 2.1, 2.1 and 2.2 would have to wait of the three classes, now 1, 1 and 2 do
    assert requests.batch([DECODE], waiting) == [0]
    assert requests.batch([DECODE], waiting, now=1.0) == [0, 3, 4]


def test_who_was_let_go_stays_so_until_the_end() -> None:
    requests = some_flow()
    assert requests.batch([DECODE], [PROMPT] * 4, max_num_batched_tokens=17) == [0, 1, 2]
    assert requests.batch([DECODE] * 3, [PROMPT] * 2) == [0, 1, 2, 3, 4]
    requests.arrive(3, 2)
    assert requests.batch([DECODE] * 3, [PROMPT] * 2) == [0, 1, 2]


def test_who_lost_his_memory_is_not_held_back_again() -> None:
    requests = some_flow()
    requests.batch([DECODE], [PROMPT] * 4)
    assert requests.batch([DECODE], [Row(0, 9, num_output_tokens=1)]) == [0, 1]


@pytest.mark.parametrize(("waited", "starts"), [(9.9, False), (10.0, True)])
def test_a_lone_request_is_not_held_back_for_ever(waited: float, *, starts: bool) -> None:
    """A quarter of the objective of 40 s; the class goes together."""
    rows = [Row(0, 8, pending_seconds=waited, ttft_seconds=40.0), PROMPT]
    assert some_flow().batch([DECODE], rows) == ([0, 1, 2] if starts else [0])


def test_hold_seconds_cap_a_generous_objective() -> None:
    requests = some_flow()
    rows = [Row(0, 8, pending_seconds=30.0, ttft_seconds=1e9)]
    assert requests.batch([DECODE], rows) == [0, 1]


def test_an_idle_worker_holds_nobody_back() -> None:
    requests = some_flow()
    assert requests.batch([], [PROMPT] * 2) == [0, 1]


def test_the_rate_falls_while_nobody_arrives() -> None:
    assert some_flow().batch([DECODE], [PROMPT], now=13.0) == [0]
    assert some_flow().batch([DECODE], [PROMPT], now=14.0) == [0, 1]


def test_two_workers_expect_half_each() -> None:
    requests = some_flow()
    problem = make_problem([], [], **WIDE)
    object.__setattr__(problem, "worker", 7)
    assert requests.policy.decide(problem) is None
    assert requests.batch([DECODE], [PROMPT] * 2) == [0, 1, 2]


# Gates


def at_gate(pending: float = 0.0, num_output: int = 32, **changes: object) -> Row:
    fields = {"pending_seconds": pending, "tbt_seconds": 4.0, "max_num_tokens": 9999}
    return Row(
        7 + num_output,
        8 + num_output,
        num_output_tokens=num_output,
        **{**fields, **changes},  # type: ignore[arg-type]
    )


def gated(guess: int | None = None) -> Requests:
    """Half of the four per second pass the first gate, a quarter the second."""
    requests = some_flow(guess=guess)
    requests.complete(30, 10, 20, 100, 200)
    return requests


def test_answers_pause_at_a_gate_until_enough_stand_there() -> None:
    paused = gated().decide([DECODE, at_gate()])
    assert paused.slots.tolist() == [0]
    assert paused.reason.endswith("0 are held back, 1 pause")
    assert gated().batch([DECODE, at_gate(), at_gate()]) == [0, 1, 2]
    assert gated().batch([DECODE, at_gate(num_output=128)]) == [0, 1]  # one per second


def test_answers_pause_at_gates_alone() -> None:
    assert gated().batch([DECODE, at_gate(num_output=31), at_gate(num_output=33)]) == [0, 1, 2]


def test_known_lengths_have_no_gates() -> None:
    assert gated(guess=100).batch([DECODE, at_gate()]) == [0, 1]


@pytest.mark.parametrize(("waited", "passes"), [(0.9, False), (1.0, True)])
def test_nobody_pauses_for_ever(waited: float, *, passes: bool) -> None:
    """A quarter of the objective of 4 s."""
    assert gated().batch([DECODE, at_gate(waited)]) == ([0, 1] if passes else [0])


def test_nobody_pauses_alone() -> None:
    assert gated().batch([at_gate()]) == [0]


def test_a_paused_answer_keeps_its_memory() -> None:
    full = [at_gate(), Row(9000, 9001, num_output_tokens=1, max_num_tokens=9999)]
    decision = gated().decide(full, num_units=18_078)
    assert decision.slots.tolist() == [0]  # 78 + 18,000 units are held: the later one gives way
    assert decision.preempted.tolist() == [1]
    roomy = gated().decide(full, num_units=18_080)
    assert roomy.slots.tolist() == [1]
    assert roomy.preempted.tolist() == []


@pytest.mark.parametrize(
    ("num_output", "guess", "repeats"),
    [(1, None, False), (33, None, True), (1, 100, True)],
    ids=["a gate ahead", "gates that are open", "known length"],
)
def test_a_run_never_passes_a_gate_that_may_be_shut(
    num_output: int, guess: int | None, *, repeats: bool
) -> None:
    requests = gated(guess)
    problem = make_problem([at_gate(num_output=num_output)] * 2, **WIDE)
    decision = requests.policy.decide(problem)
    assert decision is not None
    horizon = requests.policy.horizon(problem, decision)
    assert horizon == (Horizon() if repeats else THIS_ITERATION)


# Thresholds


def problem_of(cost: CostCoefficients, **changes: object) -> BatchProblem:
    return make_problem([], [], **{**WIDE, "cost": cost, **changes})


def joining(flow: Flow, problem: BatchProblem) -> float:
    return float(flow.thresholds(problem)[0].sum())


def test_the_equilibrium_iteration_does_what_arrives_during_it() -> None:
    """2 per second, each 10 tokens of 10 ms and 20 decodes of 10 ms: 60 % of the time."""
    flow = Flow(10.0, 8, GATES)
    for _ in range(20):
        flow.arrived(int(class_of(np.array([10]), np.array([20]))[0]), 10, 20, 0.0)
    cost = CostCoefficients(0.1, 0.01, 0.0, 0.0, {})
    assert joining(flow, problem_of(cost)) == pytest.approx(2 * 0.1 / (1 - 0.6))
    # More than can be done: as many as memory holds for 21 iterations at 20 tokens on average,
    # or as there are rows for as long.
    slow = CostCoefficients(0.1, 0.02, 0.0, 0.0, {})
    assert joining(flow, problem_of(slow, num_units=8400)) == pytest.approx(4200 / (21 * 20))
    assert joining(flow, problem_of(slow, max_num_seqs=42)) == pytest.approx(2.0)


def test_nobody_arrived_nobody_is_expected() -> None:
    assert joining(Flow(10.0, 8, GATES), problem_of(COST)) == 0.0


def test_lengths_are_forgotten_in_time() -> None:
    requests = Requests(window_answers=4)
    requests.arrive(0, 10)
    for length in [5000] * 8 + [1] * 40:
        requests.complete(0, length)
    problem = problem_of(COST)
    assert requests.policy._flow.thresholds(problem)[1].max() < 1e-3


def test_all_are_served_whatever_is_held_back() -> None:
    config = WaitConfig(window_seconds=1.0, hold_share=1.0)
    rig = make_rig(WaitPolicy(config), num_units=70, max_num_seqs=6)
    specs = [make_request(f"r{i}", 4 + i % 9, 6, ttft=5.0) for i in range(40)]
    rig.add(*specs)
    outcome = run_until_idle(rig.scheduler, rig.worker, rig.outcome)
    assert outcome.tokens == {spec.request_id: expected_tokens(spec) for spec in specs}


@pytest.mark.parametrize(
    ("field", "value"),
    [("hold_share", 1.1), ("hold_seconds", 0.0), ("window_seconds", 0.0), ("window_answers", 0)],
)
def test_bad_settings_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        WaitConfig(**{field: value})  # type: ignore[arg-type]
