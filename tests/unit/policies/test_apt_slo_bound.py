"""The bound on waiting that the policy for objectives states: the head of the line is served."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from aptserve.workload import Trace
from aptserve_scheduler.core import CostCoefficients, Objectives, Tier
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.apt_slo import AptSloConfig, AptSloPolicy
from aptserve_scheduler.sim import SimConfig, SimResult, SimWorker, simulate
from aptserve_scheduler.sim.worker import Amount
from support.operations import DEPTHS, TIER_SETS, Driver
from support.problems import Row, make_problem
from support.scheduler import KV, make_worker

CASES = [(tiers, depth) for tiers in TIER_SETS for depth in DEPTHS]


PATIENCE = AptSloConfig().patience_seconds
TTFT = 10.0


def overdue(num_tokens: int, over: float = 10.0, num_computed: int = 0, **changes: object) -> Row:
    """A late request that has been overdue for so many seconds."""
    age = TTFT + PATIENCE + over
    fields: dict[str, object] = {
        "pending_seconds": 1.0 if num_computed else age,
        "miss_after_seconds": -1.0,
        "age_seconds": age,
        "ttft_seconds": TTFT,
    }
    return Row(num_computed, num_tokens, **{**fields, **changes})  # type: ignore[arg-type]


def paused(num_tokens: int, over: float = 10.0, num_computed: int = 0, **changes: object) -> Row:
    """One without a token for so much more than it must wait, which is forgiven it."""
    waited = TTFT + PATIENCE + over
    fields = {"pending_seconds": waited, "age_seconds": waited + 9, "miss_after_seconds": math.inf}
    return overdue(num_tokens, over, num_computed, **{**fields, **changes})


def decide(problem: BatchProblem, **config: float) -> Decision | None:
    return AptSloPolicy(AptSloConfig(**config)).decide(problem)


def served(
    running: list[Row], waiting: list[Row], **changes: object
) -> tuple[list[int], list[int]]:
    """Slots in the batch, and those that give way."""
    fields: dict[str, object] = {"tiers": (KV,), "max_num_batched_tokens": 64, **changes}
    decision = decide(make_problem(running, waiting, **fields))
    assert decision is not None
    return decision.slots.tolist(), decision.preempted.tolist()


def test_whoever_holds_memory_gives_way_for_the_head() -> None:
    live = Row(28, 29)
    assert served([live], [overdue(20)]) == ([1], [0])
    late_but_patient = overdue(20, over=-1.0)
    assert served([live], [late_but_patient]) == ([0], [])


def test_the_head_is_the_highest_priority_then_the_earliest() -> None:
    rows = [overdue(20, over=20.0), overdue(20, priority=1), overdue(20, over=5.0, priority=1)]
    assert served([], rows) == ([1], [])


def test_the_head_goes_first_however_small_the_batch() -> None:
    running = [Row(4, 5, pending_seconds=9.0), overdue(6, num_computed=5)]
    assert served(running, [], max_num_batched_tokens=1) == ([1], [])
    running = [overdue(6, num_computed=5, over=5.0)]
    assert served(running, [overdue(8)], max_num_batched_tokens=1)[0] == [1]


def test_a_running_head_keeps_its_memory_and_grows() -> None:
    running = [Row(14, 15), overdue(16, num_computed=15)]
    assert served(running, []) == ([1], [0])


def test_a_prompt_at_the_head_goes_on_when_there_is_no_time() -> None:
    running = [Row(4, 5, miss_after_seconds=1.0001), overdue(20, num_computed=5)]
    decision = decide(make_problem(running, max_num_batched_tokens=64))
    assert decision is not None
    assert dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))[1] == 15


def test_the_head_takes_the_row_of_one_behind_it() -> None:
    running = [overdue(6, num_computed=5, over=5.0)]
    assert served(running, [overdue(8)], max_num_seqs=1) == ([1], [0])


def test_those_who_follow_are_served_too_within_the_lane() -> None:
    live, rows = Row(28, 29), [overdue(4, over=20.0), overdue(4)]  # 10 units each
    problem = make_problem([live], rows, tiers=(KV,), max_num_batched_tokens=64)
    for share, expected in ((0.05, [1]), (0.4, [1, 2])):
        decision = decide(problem, lane_share=share)
        assert decision is not None
        assert sorted(decision.slots.tolist())[: len(expected)] == expected
        assert len(set(decision.slots.tolist()) & {1, 2}) >= len(expected)


def test_memory_in_flight_is_waited_for_when_the_head_needs_it() -> None:
    ending = Row(20, 29, max_num_tokens=29, schedulable=False)
    rows = [ending, Row(4, 5)]
    assert decide(make_problem(rows, [overdue(20)], tiers=(KV,))) is None
    growing = overdue(21, num_computed=9)  # needs 8 tokens' units more, 9 - 8 are in its way
    assert decide(make_problem([ending, growing], max_num_batched_tokens=64, tiers=(KV,))) is None


def test_who_was_paused_for_too_long_heads_the_line() -> None:
    live = Row(28, 29)
    assert served([live], [paused(20)]) == ([1], [0])
    assert served([live], [paused(20, over=-1.0)]) == ([0], [])
    assert served([live], [overdue(20), paused(20, over=20.0)]) == ([2], [0])
    assert served([live], [overdue(20, over=30.0), paused(20)]) == ([1], [0])


def test_age_alone_does_not_make_a_paused_one_overdue() -> None:
    row = paused(20, over=-1.0, age_seconds=10 * PATIENCE)
    assert served([Row(28, 29)], [row]) == ([0], [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"pauses": False}, [1]), ({"patience_seconds": math.inf}, [0])],
)
def test_it_does_so_in_the_steady_variant_too_but_not_in_the_unbounded(
    config: dict[str, float], expected: list[int]
) -> None:
    problem = make_problem([Row(28, 29)], [paused(20)], tiers=(KV,), max_num_batched_tokens=64)
    decision = decide(problem, **config)
    assert decision is not None
    assert decision.slots.tolist() == expected


def test_it_keeps_its_memory_until_its_token_is_there() -> None:
    under_way = paused(20, num_computed=10)
    assert served([under_way, Row(10, 11)], [], num_units=50) == ([0], [1])
    cannot_wait = [Row(0, 2), Row(0, 8)]  # the second would need its memory
    assert served([under_way], cannot_wait, num_units=50) == ([0, 1], [])
    assert served([Row(4, 5), under_way], [], max_num_batched_tokens=8) == ([1], [])


class WatchedPolicy(AptSloPolicy):
    """Asserts of each decision that the head of the line is in it, found without its code."""

    num_heads = num_paused_heads = num_pauses = 0

    def decide(self, problem: BatchProblem) -> Decision | None:
        decision = super().decide(problem)
        can_pause = problem.running.slots[np.isinf(problem.running.miss_after_seconds)]
        if decision is not None:
            type(self).num_pauses += len(np.intersect1d(can_pause, decision.preempted))
        line = [*self._overdue(problem, runs=True), *self._overdue(problem, runs=False)]
        if not line:
            return decision
        _, _, slot, num_remaining, is_paused = max(line, key=lambda entry: entry[:2])
        if decision is None:
            assert not problem.running.schedulable.all(), "nothing in flight holds memory or a row"
            return decision
        type(self).num_heads += 1
        type(self).num_paused_heads += is_paused
        tokens = dict(zip(decision.slots.tolist(), decision.num_tokens.tolist(), strict=True))
        least = min(num_remaining, 64, problem.max_num_batched_tokens)
        assert tokens.get(slot, 0) >= least, "the head of the line is not served"
        assert slot not in decision.preempted
        return decision

    def _overdue(
        self, problem: BatchProblem, *, runs: bool
    ) -> list[tuple[int, float, int, int, bool]]:
        """Priority, age, slot, remaining tokens of each, and whether it was paused.

        Those in flight have no say.
        """
        candidates = problem.running if runs else problem.waiting
        found = []
        for row in range(len(candidates)):
            slack = candidates.miss_after_seconds[row] - candidates.pending_seconds[row]
            num_tokens = int(candidates.num_tokens[row])
            cost, pairs = problem.cost, 0.5 * num_tokens**2
            prompt = cost.seconds_per_sequence + cost.seconds_per_token * num_tokens
            prompt += cost.seconds_per_attention_pair * pairs
            is_late = slack < (0.0 if runs else prompt + cost.base_seconds)
            is_paused = bool(candidates.miss_after_seconds[row] == math.inf)
            waited = (candidates.pending_seconds if is_paused else candidates.age_seconds)[row]
            is_over = waited > candidates.ttft_seconds[row] + self.config.patience_seconds
            if (is_late or is_paused) and is_over and candidates.schedulable[row]:
                remaining = int(candidates.num_remaining_tokens[row])
                age, priority = float(candidates.age_seconds[row]), int(candidates.priorities[row])
                found.append((priority, age, int(candidates.slots[row]), remaining, is_paused))
        return found


@pytest.mark.parametrize(("tiers", "depth"), CASES)
@pytest.mark.parametrize("lane_share", [0.05, 0.6])
def test_the_head_of_the_line_is_in_every_batch(tiers: str, depth: int, lane_share: float) -> None:
    WatchedPolicy.num_heads = 0
    for seed in (1, 2):
        policy = WatchedPolicy(AptSloConfig(patience_seconds=0.1, lane_share=lane_share))
        Driver(seed, policy, TIER_SETS[tiers], depth).run(200)
    assert WatchedPolicy.num_heads > 20


class TokenCost:
    """10 ms for an iteration and 1 ms for each token computed, as the worker says of itself."""

    def seconds(
        self,
        num_cached: npt.NDArray[np.int64],
        num_new: npt.NDArray[np.int64],
        tiers: npt.NDArray[np.int8],
    ) -> float:
        return 0.01 + 1e-3 * int(num_new.sum())

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        return 0.01 + 1e-3 * sum(num_sequences)


COST = CostCoefficients(0.01, 1e-3, 0.0, 0.0, {Tier.KV: 0.0})
LARGE = (20, 25, 60)
"""Arrivals that need most of the pool, so that no small one fits beside them."""


def play_overload(patience_seconds: float) -> SimResult:
    """Small requests that keep the pool full for some 20 s, and three large ones among them."""
    num = 150
    prompts, outputs = np.full(num, 20), np.full(num, 30)
    prompts[list(LARGE)], outputs[list(LARGE)] = 180, 5
    trace = Trace(
        name="overload",
        arrival_seconds=0.14 * np.arange(num),
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        tenants=("",) * num,
        priorities=np.zeros(num, np.int64),
        note="",
    )
    spec = make_worker(tiers=(KV,), max_num_batched_tokens=256, cost=COST)
    return simulate(
        trace,
        SimConfig(
            policy=AptSloPolicy(AptSloConfig(patience_seconds=patience_seconds)),
            workers=(SimWorker(spec, TokenCost()),),
            objectives=Objectives(1.0, 1.0),
        ),
    )


def test_without_the_line_the_large_wait_for_the_end_of_the_overload() -> None:
    records = play_overload(patience_seconds=1e9).records
    assert min(records[index].longest_wait_seconds for index in LARGE) > 10.0


def test_with_it_they_are_served_in_order_soon_after_they_are_overdue() -> None:
    records = play_overload(patience_seconds=2.0).records
    assert all(record.completed for record in records)
    assert max(record.longest_wait_seconds for record in records) < 5.0
    large = [records[index] for index in LARGE]
    ends = [record.arrival_seconds + record.total_seconds for record in large]
    assert ends == sorted(ends)


def play_pauses(patience_seconds: float, depth: int) -> SimResult:
    """Outputs long enough for a gap to be forgiven, more of them than the worker keeps up with."""
    num = 60
    trace = Trace(
        name="pauses",
        arrival_seconds=0.35 * np.arange(num),
        num_prompt_tokens=np.tile([10, 90, 30], num // 3),
        num_output_tokens=np.tile([130, 250, 160, 210], num // 4),
        tenants=("",) * num,
        priorities=np.tile([0, 0, 0, 1, 0], num // 5),
        note="",
    )
    spec = make_worker(tiers=(KV,), num_units=1200, max_num_batched_tokens=64, cost=COST)
    return simulate(
        trace,
        SimConfig(
            policy=WatchedPolicy(AptSloConfig(patience_seconds=patience_seconds)),
            workers=(SimWorker(spec, TokenCost()),),
            objectives=Objectives(1.0, 1.0),
            pipeline_depth=depth,
        ),
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_the_head_of_the_line_is_in_every_batch_if_it_was_paused_too(depth: int) -> None:
    WatchedPolicy.num_paused_heads = WatchedPolicy.num_pauses = 0
    result = play_pauses(0.3, depth)
    assert all(record.completed for record in result.records)
    assert WatchedPolicy.num_pauses > 3
    assert WatchedPolicy.num_paused_heads > 5
