"""Random operations on a scheduler, against workers that check every plan by themselves.

After each operation the books are recounted. At the end everything is drained: each accepted
request has ended exactly once, with a prefix of the tokens that an undisturbed run gives, and
nothing is held any more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from aptserve_scheduler.core import (
    BatchPlan,
    DuplicateRequest,
    FinishReason,
    QueueFull,
    RequestFinished,
    RequestId,
    RequestSpec,
    RequestTooLarge,
    Scheduler,
    SchedulerConfig,
    SchedulerError,
    Tier,
    TierSpec,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.policies import Policy

from support.scheduler import CheckingWorker, Outcome, expected_tokens, make_request, make_worker

KV_ALONE = (TierSpec(Tier.KV, 2),)
HALF = (TierSpec(Tier.KV, 2), TierSpec(Tier.HIDDEN, 1))
THREE = (TierSpec(Tier.KV, 8), TierSpec(Tier.HIDDEN, 3), TierSpec(Tier.KV8, 4, exact=False))
TIER_SETS = {"kv": KV_ALONE, "hidden": HALF, "hidden_kv8": THREE}
DEPTHS = (1, 2, 3)


class Driver:
    """Draws operations, carries them out, and knows by itself what must come of them."""

    def __init__(self, seed: int, policy: Policy, tiers: tuple[TierSpec, ...], depth: int) -> None:
        self.rng = random.Random(f"{seed} {policy.name} {tiers} {depth}")
        self.depth = depth
        self.tiers = tiers
        usable = policy.usable_tiers(tiers)
        self.smallest_block = min(tier.units_per_block for tier in usable)
        self.max_waiting = self.rng.choice([3, 10, 1000])
        self.scheduler = Scheduler(SchedulerConfig(depth, self.max_waiting), policy)
        self.workers: dict[WorkerId, CheckingWorker] = {}
        self.accepted: dict[RequestId, RequestSpec] = {}
        self.outcome = Outcome()
        self.now = 0.0
        self.num_workers_seen = 0
        self.plans: list[BatchPlan] = []

    def run(self, num_operations: int) -> None:
        """Random operations with a recount after each, then the drain."""
        operations: list[tuple[Callable[[], None], int]] = [
            (self.arrive, 22),
            (self.plan, 30),
            (self.step, 30),
            (self.finish, 4),
            (self.fail, 1),
            (self.tell_releases, 5),
            (self.attach, 2),
            (self.lose, 1),
        ]
        kinds, weights = zip(*operations, strict=True)
        self.attach()
        for operation in self.rng.choices(kinds, weights, k=num_operations):
            self.now += self.rng.choice([0.0, 0.001, 0.02, 0.3])
            operation()
            self.check()
        self.drain()

    def check(self) -> None:
        """What holds after every operation."""
        self.scheduler.check_integrity()
        num_live = len(self.accepted) - len(self.outcome.finished)
        assert self.scheduler.num_requests == num_live

    # Requests

    def arrive(self) -> None:
        """A request arrives; sometimes too large, sometimes under an id in use."""
        rng = self.rng
        spec = make_request(
            f"r{len(self.accepted)}",
            prompt_len=rng.choice([1, 2, rng.randint(3, 20), rng.randint(20, 60)]),
            max_tokens=rng.choice([1, 2, rng.randint(3, 12)]),
            ttft=rng.choice([0.01, 0.5, 5.0]),
            tbt=rng.choice([0.01, 0.5, 5.0]),
        )
        if rng.random() < 0.1:
            known = expected_tokens(spec)[: rng.randint(0, spec.max_tokens)]
            spec = make_request(
                spec.request_id, len(spec.prompt_token_ids), spec.max_tokens, resume=known
            )
        spec = replace(
            spec,
            tenant=rng.choice(["", "a", "b"]),
            priority=rng.choice([-2, 0, 0, 0, 1, 5]),
            expected_output_tokens=rng.choice([None, 1, spec.max_tokens, 3 * spec.max_tokens]),
        )
        is_complete = len(spec.resume_token_ids) == spec.max_tokens
        num_waiting = self.scheduler.snapshot(self.now).num_waiting
        if self.is_too_large(spec):
            self.refuse(spec, RequestTooLarge)
        elif num_waiting >= self.max_waiting and not is_complete:
            self.refuse(spec, QueueFull)
        else:
            self.accepted[spec.request_id] = spec
            self.outcome.note(self.scheduler.add_request(spec, self.now))
            if not is_complete:
                self.refuse(spec, DuplicateRequest)

    def refuse(self, spec: RequestSpec, kind: type[SchedulerError]) -> None:
        """A request that must not be accepted."""
        with pytest.raises(kind):
            self.scheduler.add_request(spec, self.now)

    def is_too_large(self, spec: RequestSpec) -> bool:
        """Whether no attached worker could hold the request to its end."""
        longest = len(spec.prompt_token_ids) + spec.max_tokens
        return bool(self.workers) and all(
            -(-longest // worker.spec.block_size) * self.smallest_block > worker.spec.num_units
            for worker in self.workers.values()
        )

    def some_request(self) -> RequestId:
        """A live request more often than not, else one that ended or never was."""
        live = [name for name in self.accepted if name not in self.outcome.finished]
        return self.rng.choice([*live, *list(self.accepted)[:2], RequestId("never was")])

    def finish(self) -> None:
        """A client goes away, or a stop string was found."""
        request_id = self.some_request()
        reason = self.rng.choice([FinishReason.ABORT, FinishReason.STOP])
        was_live = request_id in self.accepted and request_id not in self.outcome.finished
        events = self.scheduler.finish(request_id, reason, self.now)
        assert len(events) == was_live
        self.outcome.note(events)
        assert not self.scheduler.finish(request_id, reason, self.now)

    def fail(self) -> None:
        """A request is ended with an error from outside."""
        self.outcome.note(self.scheduler.fail(self.some_request(), "broken outside", self.now))

    # Workers

    def attach(self) -> None:
        """A worker comes, with a pool of any size down to a single block."""
        if len(self.workers) >= 3:
            return
        rng = self.rng
        kv_block = self.tiers[0].units_per_block
        self.num_workers_seen += 1
        spec = make_worker(
            f"w{self.num_workers_seen}",
            num_units=kv_block * rng.choice([1, 4, 15, 60]) + rng.randint(0, kv_block - 1),
            block_size=rng.choice([1, 4, 7]),
            tiers=self.tiers,
            max_num_seqs=rng.choice([1, 3, 16]),
            max_num_batched_tokens=rng.choice([1, 8, 64]),
        )
        self.add(spec)

    def add(self, spec: WorkerSpec) -> None:
        self.scheduler.add_worker(spec, self.now)
        self.workers[spec.worker_id] = CheckingWorker(
            spec,
            rng=random.Random(self.rng.random()),
            end_probability=0.05,
            fail_probability=0.01,
            promotes_ended=self.rng.random() < 0.5,
        )

    def lose(self) -> None:
        """A worker dies with everything it holds, plans under way included."""
        if self.workers:
            worker_id = self.rng.choice(list(self.workers))
            del self.workers[worker_id]
            self.outcome.note(self.scheduler.remove_worker(worker_id, self.now))

    def plan(self) -> None:
        """Ask for one worker's next plan."""
        if self.workers:
            self.plan_for(self.rng.choice(list(self.workers.values())))

    def plan_for(self, worker: CheckingWorker) -> None:
        worker_id = worker.spec.worker_id
        plan = self.scheduler.plan(worker_id, self.now)
        if plan is not None:
            assert len(worker.plans) < self.depth
            worker.receive(plan)
            self.plans.append(plan)
            return
        if not any(other.plans for other in self.workers.values()):
            assert not self.scheduler.has_work(worker_id), "nothing is in flight and nothing runs"

    def step(self) -> None:
        """One worker answers its oldest plan."""
        busy = [worker for worker in self.workers.values() if worker.plans]
        if busy:
            self.step_of(self.rng.choice(busy))

    def step_of(self, worker: CheckingWorker) -> None:
        result = worker.step(seconds=self.rng.choice([0.001, 0.01, 0.2]))
        self.outcome.note(self.scheduler.apply(worker.spec.worker_id, result, self.now))

    def tell_releases(self) -> None:
        """A worker hears without a plan what it may forget."""
        for worker_id, worker in self.workers.items():
            releases = self.scheduler.take_releases(worker_id)
            assert not (releases and worker.plans)
            worker.release(releases)

    # The end

    def drain(self) -> None:
        """Run until no request is left, then see that nobody holds anything."""
        if not self.workers:
            self.attach()
        # Nothing else may tell those who waited for a worker that was lost.
        self.outcome.note(self.scheduler.fail_unservable(self.now))
        for _ in range(200 * (len(self.accepted) + 1)):
            if not self.scheduler.num_requests:
                break
            self.now += 0.01
            for worker in self.workers.values():
                self.plan_for(worker)
            self.step()
            self.check()
        assert not self.scheduler.num_requests, "the drain does not come to an end"
        for worker in self.workers.values():
            while worker.plans:
                self.step_of(worker)
        self.tell_releases()
        self.check()
        self.check_nothing_is_held()
        self.check_outcome()

    def check_nothing_is_held(self) -> None:
        snapshot = self.scheduler.snapshot(self.now)
        assert (snapshot.num_waiting, snapshot.num_running) == (0, 0)
        for worker in snapshot.workers:
            assert worker.num_used_units == 0
            assert not self.scheduler.has_work(worker.worker_id)
            assert not self.workers[worker.worker_id].sequences

    def check_outcome(self) -> None:
        assert self.outcome.finished.keys() == self.accepted.keys()
        for request_id, end in self.outcome.finished.items():
            spec = self.accepted[request_id]
            tokens = self.outcome.tokens.get(request_id, [])
            expected = expected_tokens(spec)
            assert tokens == expected[: len(tokens)]
            assert end.num_output_tokens == len(spec.resume_token_ids) + len(tokens)
            assert (end.reason is None) == (end.error is not None)
            if end.reason is FinishReason.LENGTH:
                assert tokens == expected
        self.check_totals()

    def check_totals(self) -> None:
        ends: list[RequestFinished] = list(self.outcome.finished.values())
        totals = self.scheduler.snapshot(self.now).totals
        good = {FinishReason.STOP, FinishReason.LENGTH}
        assert totals.num_accepted == len(ends)
        assert totals.num_finished == sum(end.reason in good for end in ends)
        assert totals.num_aborted == sum(end.reason is FinishReason.ABORT for end in ends)
        assert totals.num_failed == sum(end.error is not None for end in ends)
        assert totals.num_objectives_met == sum(end.timing.objectives_met for end in ends)
        assert totals.num_promotions == sum(len(plan.promoted) for plan in self.plans)
        assert totals.num_output_tokens == sum(map(len, self.outcome.tokens.values()))
