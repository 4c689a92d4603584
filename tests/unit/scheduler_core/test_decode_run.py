"""Iterations entered at once leave the same books as iterations planned one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    CostCoefficients,
    DecodeRun,
    DecodeTurns,
    Event,
    FinishReason,
    PlanInFlight,
    RequestFinished,
    RequestId,
    RequestSpec,
    Scheduler,
    SchedulerConfig,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
)
from aptserve_scheduler.core.table import RequestTable
from aptserve_scheduler.policies import Policy, create_policy, policy_names
from aptserve_scheduler.policies.apt import AptPolicy
from aptserve_scheduler.policies.apt_slo import AptSloConfig, AptSloPolicy
from aptserve_scheduler.policies.base import Service
from aptserve_scheduler.policies.mlfq import MlfqConfig, MlfqPolicy
from aptserve_scheduler.policies.qos import QosConfig, QosPolicy
from aptserve_scheduler.policies.srtf import SrtfConfig, SrtfPolicy
from support.scheduler import HIDDEN, KV, WORKER, make_cost, make_request, make_worker

STEP = 2**-6
"""Seconds of an iteration; a power of two, so that sums are exact however they are made."""

IMPATIENT: dict[str, Callable[[], Policy]] = {
    "impatient apt-slo": lambda: AptSloPolicy(AptSloConfig(patience_seconds=0.2)),
    "impatient mlfq": lambda: MlfqPolicy(MlfqConfig(starving_seconds=0.3)),
    "impatient qos": lambda: QosPolicy(QosConfig(relegated_share=0.2, relegated_seconds=0.3)),
    "impatient srtf": lambda: SrtfPolicy(SrtfConfig(quantum_seconds=0.01, ageing_seconds=0.2)),
}
"""Policies whose patience of a minute ends within the seconds that are played here."""


SLOW_HIDDEN = make_cost(seconds_per_cached_token={Tier.KV: 1e-7, Tier.HIDDEN: 1e-3})
"""So slow that hidden requests sit out again and again."""


def make_scheduler(
    policy: str | Policy, tiers: tuple[TierSpec, ...] = (KV,), cost: CostCoefficients | None = None
) -> Scheduler:
    if isinstance(policy, str):
        policy = IMPATIENT[policy]() if policy in IMPATIENT else create_policy(policy)
    scheduler = Scheduler(SchedulerConfig(pipeline_depth=1, learns_costs=False), policy)
    worker = make_worker(tiers=tiers, num_units=60, cost=cost or make_cost())
    scheduler.add_worker(worker, 0.0)
    return scheduler


def answer(plan: BatchPlan, known: dict[str, int]) -> StepResult:
    """A token for each sequence whose known tokens are all computed."""
    outputs = []
    for entry in plan.scheduled:
        if entry.num_computed_tokens + entry.num_new_tokens == known[entry.request_id]:
            known[entry.request_id] += 1
            outputs.append(SequenceOutput(entry.sequence_id, (0,)))
    return StepResult(plan.plan_id, tuple(outputs), STEP)


Made = BatchPlan | PlanInFlight | DecodeRun | DecodeTurns | None


class Player:
    """Plays arrivals to their ends, whose lengths are as far as they may get."""

    def __init__(self, scheduler: Scheduler, arrivals: list[tuple[float, RequestSpec]]) -> None:
        self.ended: dict[str, RequestFinished] = {}
        self.num_skipped = 0
        """Iterations entered without a plan each."""
        self.num_uneven = 0
        """Of these, such in which not all of the running decoded."""
        self._scheduler = scheduler
        self._pending = list(arrivals)
        self.now = 0.0
        self._known: dict[str, int] = {}
        self._limits = {
            spec.request_id: len(spec.prompt_token_ids) + spec.max_tokens for _, spec in arrivals
        }

    def play(self, *, in_runs: bool) -> None:
        while self._pending or self._scheduler.num_requests:
            made = self._next(in_runs=in_runs)
            self._scheduler.check_integrity()
            self._enter(made)
            self._scheduler.check_integrity()

    def play_until_turns(self) -> DecodeTurns:
        while not isinstance(made := self._next(in_runs=True), DecodeTurns):
            self._enter(made)
        return made

    def _next(self, *, in_runs: bool) -> Made:
        while self._pending and self._pending[0][0] <= self.now:
            at, spec = self._pending.pop(0)
            self._known[spec.request_id] = len(spec.prompt_token_ids)
            self._scheduler.add_request(spec, at)
        scheduler = self._scheduler
        return (scheduler.begin_or_run if in_runs else scheduler.plan)(WORKER, self.now)

    def _enter(self, made: Made) -> None:
        if isinstance(made, DecodeRun):
            self._enter_run(made)
        elif isinstance(made, DecodeTurns):
            self._take_turns(made)
        elif made is not None:
            self._step(made)
        else:
            self.now = self._next_arrival

    @property
    def _next_arrival(self) -> float:
        return self._pending[0][0] if self._pending else math.inf

    def _step(self, plan: BatchPlan | PlanInFlight) -> None:
        self.now += STEP
        if isinstance(plan, BatchPlan):
            result = answer(plan, self._known)
            self._note(self._scheduler.apply(WORKER, result, self.now))
            return
        for request_id, end in zip(plan.request_ids, plan.ends.tolist(), strict=True):
            self._known[request_id] += end == self._known[request_id]
        never = np.full(len(plan.slots), 10**6)
        self._note(self._scheduler.complete(WORKER, never, STEP, self.now))

    def _enter_run(self, run: DecodeRun) -> None:
        most = max(math.ceil((min(run.until, self._next_arrival, 1e9) - self.now) / STEP), 1)
        num_steps = min(run.max_steps, most if run.longest_seconds >= STEP else 1)
        ends = self.now + STEP * np.arange(1, num_steps + 1)
        self._scheduler.enter_run(WORKER, run, ends, self.now)
        self.num_skipped += num_steps
        self.now += num_steps * STEP
        for request_id in run.request_ids:
            self._known[request_id] += num_steps
        self._end_full(run.request_ids)

    def _take_turns(self, turns: DecodeTurns) -> None:
        start, full = self.now, False
        while not full and (self.now == start or self.now < self._next_arrival):
            entries = turns.next(self.now)
            if entries is None:
                break
            self.now += STEP
            turns.take(entries, self.now)
            self.num_skipped += 1
            self.num_uneven += len(entries) < len(turns.slots)
            for request_id in [turns.request_ids[entry] for entry in entries]:
                self._known[request_id] += 1
                full |= self._known[request_id] == self._limits[request_id]
        self._scheduler.enter_turns(WORKER, turns, start)
        self._end_full(turns.request_ids)

    def _end_full(self, request_ids: tuple[RequestId, ...]) -> None:
        """As the caller of a run has to."""
        for request_id in request_ids:
            if self._known[request_id] == self._limits[request_id]:
                length = FinishReason.LENGTH
                self._note(self._scheduler.finish(request_id, length, self.now))

    def _note(self, events: list[Event]) -> None:
        self.ended.update({e.request_id: e for e in events if isinstance(e, RequestFinished)})


def play(
    scheduler: Scheduler, arrivals: list[tuple[float, RequestSpec]], *, in_runs: bool
) -> Player:
    player = Player(scheduler, arrivals)
    player.play(in_runs=in_runs)
    return player


def random_arrivals(rng: random.Random, gaps: tuple[float, ...]) -> list[tuple[float, RequestSpec]]:
    arrivals = []
    at = 0.0
    for index in range(25):
        at += rng.choice(gaps)
        spec = make_request(
            f"r{index}", prompt_len=rng.randint(1, 70), max_tokens=rng.randint(1, 40), ttft=0.1
        )
        guess, tenant = rng.choice((None, rng.randint(1, 40))), rng.choice("ab")
        priority = rng.choice((0, 0, 1, -2))
        spec = replace(spec, expected_output_tokens=guess, tenant=tenant, priority=priority)
        arrivals.append((at, spec))
    return arrivals


CROWDED = (0.0, 0.05, 0.15)


@pytest.mark.parametrize("policy", [*policy_names(), *IMPATIENT])
@pytest.mark.parametrize("gaps", [(0.0, 0.25, 2.0), CROWDED], ids=["idle", "crowded"])
@pytest.mark.parametrize("seed", range(4))
def test_runs_change_nothing(policy: str, gaps: tuple[float, ...], seed: int) -> None:
    arrivals = random_arrivals(random.Random(seed), gaps)
    tiers = (KV, HIDDEN) if seed % 2 else (KV,)
    one_by_one = play(make_scheduler(policy, tiers), arrivals, in_runs=False)
    at_once = play(make_scheduler(policy, tiers), arrivals, in_runs=True)
    assert at_once.ended == one_by_one.ended
    assert one_by_one.num_skipped == 0
    assert len(at_once.ended) == len(arrivals)
    assert at_once.num_skipped > 0


@pytest.mark.parametrize("seed", range(12))
def test_turns_change_nothing(seed: int) -> None:
    arrivals = random_arrivals(random.Random(seed), CROWDED)
    ended = []
    for in_runs in (False, True):
        scheduler = make_scheduler("apt", (KV, HIDDEN), SLOW_HIDDEN)
        played = play(scheduler, arrivals, in_runs=in_runs)
        ended.append((played.ended, replace(scheduler.snapshot(0.0), oldest_wait_seconds=0.0)))
    assert ended[0] == ended[1]
    assert played.num_uneven > 0


class FollowingApt(AptPolicy):
    """Adds up the service it is told of."""

    needs_history = True

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        self.seconds = 0.0

    def served(self, service: Service) -> None:
        self.num_tokens += int(service.num_output_tokens.sum())
        self.seconds += service.seconds


def test_a_policy_is_told_of_the_service_in_turns() -> None:
    totals = []
    for in_runs in (False, True):
        policy = FollowingApt()
        scheduler = make_scheduler(policy, (KV, HIDDEN), SLOW_HIDDEN)
        arrivals = random_arrivals(random.Random(1), CROWDED)
        assert (play(scheduler, arrivals, in_runs=in_runs).num_uneven > 0) == in_runs
        totals.append((policy.num_tokens, policy.seconds))
    assert totals[0] == totals[1]


def test_turns_have_bounds() -> None:
    arrivals = random_arrivals(random.Random(1), CROWDED)
    scheduler = make_scheduler("apt", (KV, HIDDEN), SLOW_HIDDEN)
    player = Player(scheduler, arrivals)
    turns = player.play_until_turns()
    with pytest.raises(ValueError, match="no iteration was taken"):
        scheduler.enter_turns(WORKER, turns, player.now)
    for _ in range(100):
        turns.take(np.arange(len(turns.slots)), player.now + STEP)
    with pytest.raises(ValueError, match="more than its max_tokens"):
        scheduler.enter_turns(WORKER, turns, player.now)


def test_a_run_has_bounds() -> None:
    scheduler = make_scheduler("fcfs")
    scheduler.add_request(make_request(max_tokens=20), 0.0)
    plan = scheduler.plan(WORKER, 0.0)
    assert plan is not None
    scheduler.apply(WORKER, answer(plan, {"r": 8}), STEP)
    run = scheduler.begin_or_run(WORKER, STEP)
    assert isinstance(run, DecodeRun)
    with pytest.raises(ValueError, match=f"0 steps of a run of at most {run.max_steps}"):
        scheduler.enter_run(WORKER, run, np.zeros(0), STEP)


def test_a_run_lasts_as_long_as_the_memory() -> None:
    """Four caches that begin their blocks at different steps; every free unit is used."""
    for num_units in range(16, 60):
        scheduler = Scheduler(
            SchedulerConfig(pipeline_depth=1, learns_costs=False), create_policy("fcfs")
        )
        scheduler.add_worker(make_worker(num_units=num_units, block_size=4), 0.0)
        known = {}
        for length in (1, 2, 4, 7):
            known[f"r{length}"] = length
            spec = make_request(f"r{length}", prompt_len=length, max_tokens=20)
            scheduler.add_request(spec, 0.0)
        plan = scheduler.plan(WORKER, 0.0)
        assert plan is not None
        scheduler.apply(WORKER, answer(plan, known), STEP)
        run = scheduler.begin_or_run(WORKER, STEP)
        if not isinstance(run, DecodeRun):
            continue  # not all of them fit for a first step
        num_steps = run.max_steps
        after = [-(-(cached + num_steps) // 4) * 2 for cached in run.num_cached.tolist()]
        one_more = [-(-(cached + num_steps + 1) // 4) * 2 for cached in run.num_cached.tolist()]
        assert sum(after) <= num_units
        assert sum(one_more) > num_units or num_steps == 20 - 1


def test_the_late_are_late_as_long_as_it_says() -> None:
    table = RequestTable()
    slot = table.add(make_request(tbt=0.5), 0.0)
    slots = np.array([slot])
    for num_gaps, num_slow, missed in (
        (0, 0, False),
        (99, 0, False),
        (30, 1, False),
        (100, 1, False),
        (150, 2, False),
        (30, 1, True),
    ):
        table.num_gaps[slot], table.num_slow_gaps[slot] = num_gaps, num_slow
        table.missed_ttft[slot] = missed
        table.judge(slots)
        was_late = float(table.miss_after[slot]) < 0
        most = table.num_gaps_until_live(slots)
        for num_more in range(min(most, 300) + 1):
            table.num_gaps[slot] = num_gaps + num_more
            table.judge(slots)
            is_late = float(table.miss_after[slot]) < 0
            assert (is_late == was_late) == (num_more < most)
