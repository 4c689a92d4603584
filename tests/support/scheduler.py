"""Builders for scheduler tests, and a worker that checks every plan it gets."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aptserve_scheduler.core import (
    BatchPlan,
    CostCoefficients,
    Event,
    FinishReason,
    Objectives,
    RequestFinished,
    RequestId,
    RequestSpec,
    ScheduledSequence,
    Scheduler,
    SchedulerConfig,
    SequenceFailure,
    SequenceId,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
    TokensAppended,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.policies import Policy, create_policy

KV = TierSpec(Tier.KV, units_per_block=2)
HIDDEN = TierSpec(Tier.HIDDEN, units_per_block=1)
WORKER = WorkerId("w")


def make_cost(**changes: object) -> CostCoefficients:
    """A worker on which hidden tokens cost a little more than KV tokens."""
    fields: dict[str, object] = {
        "base_seconds": 1e-3,
        "seconds_per_token": 1e-4,
        "seconds_per_sequence": 1e-4,
        "seconds_per_attention_pair": 1e-8,
        "seconds_per_cached_token": {Tier.KV: 1e-7, Tier.HIDDEN: 1.5e-7},
    }
    return CostCoefficients(**{**fields, **changes})  # type: ignore[arg-type]


def make_worker(worker_id: str = WORKER, **changes: object) -> WorkerSpec:
    """A worker with 100 units, blocks of 4 tokens, KV and hidden."""
    fields: dict[str, object] = {
        "worker_id": WorkerId(worker_id),
        "num_units": 100,
        "block_size": 4,
        "tiers": (KV, HIDDEN),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "cost": make_cost(),
    }
    return WorkerSpec(**{**fields, **changes})  # type: ignore[arg-type]


def make_request(
    request_id: str = "r",
    prompt_len: int = 8,
    max_tokens: int = 4,
    ttft: float = 1.0,
    tbt: float = 1.0,
    resume: Sequence[int] = (),
) -> RequestSpec:
    """A request whose prompt is 1, 2, 3, ..."""
    return RequestSpec(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(range(1, prompt_len + 1)),
        max_tokens=max_tokens,
        objectives=Objectives(ttft, tbt),
        resume_token_ids=tuple(resume),
    )


def make_scheduler(
    policy: str | Policy = "fcfs", depth: int = 1, max_waiting: int = 4096, **worker: object
) -> Scheduler:
    """A scheduler with one worker ``w`` attached at time 0."""
    chosen = create_policy(policy) if isinstance(policy, str) else policy
    scheduler = Scheduler(SchedulerConfig(depth, max_waiting), chosen)
    scheduler.add_worker(make_worker(**worker), 0.0)  # type: ignore[arg-type]
    return scheduler


@dataclass
class _Sequence:
    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    tier: Tier
    num_computed: int = 0
    num_units: int = 0
    ended: bool = False


def next_token(token_ids: Sequence[int], num_prompt: int) -> int:
    """The token that a fake model puts after these: it depends on all output so far."""
    return (sum(token_ids[num_prompt:]) * 31 + len(token_ids) * 7 + token_ids[0]) % 1009


@dataclass
class CheckingWorker:
    """A worker without a model that counts units by itself and asserts that plans make sense.

    ``end_probability`` and ``fail_probability`` end or break a sequence at random;
    ``promotes_ended`` says whether a promotion of an ended sequence is carried out, which both are
    sound.
    """

    spec: WorkerSpec
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    end_probability: float = 0.0
    fail_probability: float = 0.0
    promotes_ended: bool = False
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    plans: deque[BatchPlan] = field(default_factory=deque)
    _last_plan_id: int = 0

    def receive(self, plan: BatchPlan) -> None:
        """Put a plan into the queue of those to run."""
        assert plan.worker_id == self.spec.worker_id
        self._last_plan_id += 1
        assert plan.plan_id == self._last_plan_id
        self.plans.append(plan)

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences."""
        for sequence_id in sequence_ids:
            assert self.sequences.pop(sequence_id, None) is not None, "released twice"

    @property
    def num_used_units(self) -> int:
        """Units held by sequences that have not been released."""
        return sum(sequence.num_units for sequence in self.sequences.values())

    def step(self, seconds: float = 0.01) -> StepResult:
        """Run the oldest plan."""
        plan = self.plans.popleft()
        self.release(plan.release)
        self._check_and_admit(plan)
        outputs: list[SequenceOutput] = []
        skipped: list[SequenceId] = []
        failures: list[SequenceFailure] = []
        for entry in plan.scheduled:
            sequence = self.sequences[entry.sequence_id]
            if sequence.ended:
                skipped.append(entry.sequence_id)
            elif self.rng.random() < self.fail_probability:
                sequence.ended = True
                # What a broken sequence holds is up to the worker until it is released.
                sequence.num_units = self.rng.choice([0, sequence.num_units])
                failures.append(SequenceFailure(entry.sequence_id, "broken"))
            else:
                outputs += self._compute(entry, sequence)
        assert self.num_used_units <= self.spec.num_units, "the plan does not fit the pool"
        return StepResult(
            plan_id=plan.plan_id,
            outputs=tuple(outputs),
            step_seconds=seconds,
            num_free_units=self.spec.num_units - self.num_used_units,
            skipped=tuple(skipped),
            failures=tuple(failures),
        )

    def _check_and_admit(self, plan: BatchPlan) -> None:
        assert 1 <= len(plan.scheduled) <= self.spec.max_num_seqs
        num_tokens = sum(entry.num_new_tokens for entry in plan.scheduled)
        assert num_tokens <= self.spec.max_num_batched_tokens
        assert len({entry.sequence_id for entry in plan.scheduled}) == len(plan.scheduled)
        for sequence_id in plan.promote:
            sequence = self.sequences[sequence_id]
            assert sequence.tier is Tier.HIDDEN
            if not sequence.ended or self.promotes_ended:
                sequence.tier = Tier.KV
                self._count(sequence)
        for new in plan.new:
            assert new.sequence_id not in self.sequences
            self.sequences[new.sequence_id] = _Sequence(
                list(new.token_ids), new.num_prompt_tokens, new.max_tokens, new.tier
            )
        assert len(self.sequences) <= self.spec.max_num_seqs, "more sequences than rows"

    def _compute(self, entry: ScheduledSequence, sequence: _Sequence) -> list[SequenceOutput]:
        assert entry.num_computed_tokens == sequence.num_computed
        assert entry.tier is sequence.tier
        sequence.num_computed += entry.num_new_tokens
        assert entry.num_new_tokens >= 1
        assert sequence.num_computed <= len(sequence.token_ids)
        self._count(sequence)
        if sequence.num_computed < len(sequence.token_ids):
            return []
        token = next_token(sequence.token_ids, sequence.num_prompt)
        sequence.token_ids.append(token)
        num_output = len(sequence.token_ids) - sequence.num_prompt
        reason: FinishReason | None = None
        if num_output >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        elif self.rng.random() < self.end_probability:
            reason = FinishReason.STOP
        sequence.ended = reason is not None
        return [SequenceOutput(entry.sequence_id, (token,), reason)]

    def _count(self, sequence: _Sequence) -> None:
        per_block = {tier.tier: tier.units_per_block for tier in self.spec.tiers}[sequence.tier]
        sequence.num_units = -(-sequence.num_computed // self.spec.block_size) * per_block


@dataclass
class Outcome:
    """What became of each request, as its events told."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, RequestFinished] = field(default_factory=dict)

    def note(self, events: Sequence[Event]) -> None:
        """Take in events; a request may end only once, and get no token after that."""
        for event in events:
            assert event.request_id not in self.finished, f"{event} comes after the end"
            if isinstance(event, TokensAppended):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            else:
                self.finished[event.request_id] = event


def run_until_idle(
    scheduler: Scheduler,
    worker: CheckingWorker,
    outcome: Outcome | None = None,
    now: float = 0.0,
    max_steps: int = 10_000,
) -> Outcome:
    """Plan and step until no request is left; each step takes 10 ms."""
    outcome = outcome or Outcome()
    worker_id = worker.spec.worker_id
    for _ in range(max_steps):
        if not scheduler.num_requests:
            return outcome
        while (plan := scheduler.plan(worker_id, now)) is not None:
            worker.receive(plan)
        scheduler.check_integrity()
        assert worker.plans, "requests are left and nothing runs"
        now += 0.01
        outcome.note(scheduler.apply(worker_id, worker.step(), now))
    raise AssertionError(f"{scheduler.num_requests} requests are left after {max_steps} steps")


@dataclass
class Rig:
    """A scheduler and its worker ``w``, advanced by hand; the books are recounted at each move."""

    scheduler: Scheduler
    worker: CheckingWorker
    outcome: Outcome = field(default_factory=Outcome)

    def add(self, *specs: RequestSpec, now: float = 0.0) -> None:
        """Requests that arrive together."""
        for spec in specs:
            self.outcome.note(self.scheduler.add_request(spec, now))

    def try_plan(self, now: float = 0.0) -> BatchPlan | None:
        """The next plan, handed to the worker; ``None`` if there is none now."""
        plan = self.scheduler.plan(self.worker.spec.worker_id, now)
        self.scheduler.check_integrity()
        if plan is not None:
            self.worker.receive(plan)
        return plan

    def plan(self, now: float = 0.0) -> BatchPlan:
        """Like :meth:`try_plan`; there must be one."""
        plan = self.try_plan(now)
        assert plan is not None
        return plan

    def answer(self, now: float = 0.0, **changes: object) -> list[Event]:
        """The worker runs its oldest plan and answers, with fields of the result replaced."""
        result = replace(self.worker.step(), **changes)  # type: ignore[arg-type]
        events = self.scheduler.apply(self.worker.spec.worker_id, result, now)
        self.scheduler.check_integrity()
        self.outcome.note(events)
        return events

    def finish(self, request_id: str, reason: FinishReason, now: float = 0.0) -> list[Event]:
        """End a request from outside."""
        events = self.scheduler.finish(RequestId(request_id), reason, now)
        self.scheduler.check_integrity()
        self.outcome.note(events)
        return events

    @property
    def num_used_units(self) -> int:
        """Units given out, by the scheduler's books."""
        return self.scheduler.snapshot(0.0).workers[0].num_used_units


def make_rig(policy: str | Policy = "fcfs", depth: int = 1, **worker: object) -> Rig:
    """A scheduler and a worker built from the same fields."""
    return Rig(make_scheduler(policy, depth, **worker), CheckingWorker(make_worker(**worker)))  # type: ignore[arg-type]


def expected_tokens(spec: RequestSpec) -> list[int]:
    """Output of the fake model for a request that nobody ends early, resumed tokens left out."""
    token_ids = [*spec.prompt_token_ids, *spec.resume_token_ids]
    num_prompt = len(spec.prompt_token_ids)
    while len(token_ids) - num_prompt < spec.max_tokens:
        token_ids.append(next_token(token_ids, num_prompt))
    return token_ids[num_prompt + len(spec.resume_token_ids) :]
