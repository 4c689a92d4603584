"""How long the scheduler takes to compose one plan, by policy and number of candidates.

    python -m benchmarks.decision_time [--json OUT] [--repeats N] [--sizes 50 400 1600 16000]
        [--policies apt fcfs ...]

Times ``Scheduler.plan()`` as a whole: building the problem from the request table, the policy,
checking its decision, entering it in the books and making the plan. Three situations, each with as
many candidates as stated:

* ``prefill``: up to 128 run, the others wait; a batch of at most 256 is put together from them
  within 4096 tokens.
* ``decode``: all run, a batch of 256 is chosen.
* ``decode_all``: all run and all are in the batch, or as many as the policy's own token budget
  allows (``chunked``, ``qos``, ``vtc``).

After each plan its result is applied and the requests that ended are replaced, so every plan is
composed from a like situation. The garbage collector stays on. Plans of the exact solver are few,
as one of them takes up to seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aptserve_scheduler.core import (
    BatchPlan,
    CostCoefficients,
    FinishReason,
    Objectives,
    RequestId,
    RequestSpec,
    Scheduler,
    SchedulerConfig,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
    WorkerId,
    WorkerSpec,
)
from aptserve_scheduler.policies import (
    BatchProblem,
    Decision,
    Policy,
    create_policy,
    policy_names,
)
from aptserve_scheduler.policies.base import Arrival, Service
from aptserve_scheduler.policies.fcfs import FcfsPolicy

from benchmarks.common import describe_machine

SIZES = (50, 400, 1600, 16000)
FEWER_REPEATS = {"optimal": 5}
"""Plans measured of policies that take long."""
BATCH = 256
NUM_RUNNING = 128
BLOCK_SIZE = 16
WORKER = WorkerId("bench")
_UNLIMITED_UNITS = 10**9
_PROMPT = tuple(range(2048))


class _Filling(Policy):
    """Fills a worker first come, first served, before the policy that is measured takes over."""

    def __init__(self, policy: Policy) -> None:
        self.name = policy.name
        self.needs_history = policy.needs_history
        self.fills = True
        self._policy = policy
        self._filler = FcfsPolicy()

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        return self._policy.usable_tiers(tiers)

    def decide(self, problem: BatchProblem) -> Decision | None:
        return (self._filler if self.fills else self._policy).decide(problem)

    def arrived(self, arrival: Arrival) -> None:
        self._policy.arrived(arrival)

    def served(self, service: Service) -> None:
        self._policy.served(service)

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        self._policy.ended(slot, num_output_tokens, completed=completed)


class Situation:
    """A scheduler with one worker, whose plans are answered at once."""

    def __init__(self, policy: str, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.now = 0.0
        self._policy = _Filling(create_policy(policy))
        self.scheduler = Scheduler(SchedulerConfig(1, 10**6), self._policy)
        self._random = random.Random(7)
        self._num_added = 0
        self._num_known: dict[RequestId, int] = {}
        self._residents: frozenset[RequestId] = frozenset()
        seconds = {Tier.KV: 1e-7, Tier.HIDDEN: 1.3e-7}
        self.scheduler.add_worker(
            WorkerSpec(
                worker_id=WORKER,
                num_units=_UNLIMITED_UNITS,
                block_size=BLOCK_SIZE,
                tiers=(TierSpec(Tier.KV, 2), TierSpec(Tier.HIDDEN, 1)),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                cost=CostCoefficients(5e-3, 2e-5, 1e-5, 1e-9, seconds),
            ),
            self.now,
        )

    def fill(self, num_requests: int) -> None:
        """Requests of up to 16 tokens that run and never end; the policy decides from now on."""
        self.add(num_requests, longest=16)
        while self.scheduler.snapshot(self.now).num_waiting:
            self.answer(self.plan())
        self._residents = frozenset(self._num_known)
        self._policy.fills = False

    def add(self, num_requests: int, longest: int) -> None:
        """Requests with prompts of 4 to ``longest`` tokens, half of them past their objective."""
        for _ in range(num_requests):
            self._num_added += 1
            self.now += 1e-5
            length = min(longest, 4 + int(self._random.lognormvariate(4.5, 1.0)))
            request_id = RequestId(f"request-{self._num_added}")
            self._num_known[request_id] = length
            self.scheduler.add_request(
                RequestSpec(
                    request_id=request_id,
                    prompt_token_ids=_PROMPT[:length],
                    max_tokens=100_000,
                    objectives=Objectives(self._random.choice((0.01, 100.0)), 100.0),
                ),
                self.now,
            )

    def plan(self) -> BatchPlan:
        """The next plan; there always is one."""
        plan = self.scheduler.plan(WORKER, self.now)
        if plan is None:
            raise RuntimeError("the situation has nothing to plan")
        return plan

    def answer(self, plan: BatchPlan) -> int:
        """A token for each sequence that is through with what it knows.

        Once the worker is filled, all others end with their first; returns how many.
        """
        outputs, num_ended = [], 0
        for entry in plan.scheduled:
            request_id = entry.request_id
            if entry.num_computed_tokens + entry.num_new_tokens < self._num_known[request_id]:
                continue
            self._num_known[request_id] += 1
            ends = bool(self._residents) and request_id not in self._residents
            num_ended += ends
            reason = FinishReason.STOP if ends else None
            outputs.append(SequenceOutput(entry.sequence_id, (7,), reason))
        self.now += 0.01
        result = StepResult(plan.plan_id, tuple(outputs), 0.01)
        self.scheduler.apply(WORKER, result, self.now)
        return num_ended


def _prefill(policy: str, size: int) -> Callable[[], float]:
    """Waiting requests against what is left of the batch."""
    num_running = min(size // 4, NUM_RUNNING)
    situation = Situation(policy, max_num_seqs=BATCH, max_num_batched_tokens=4096)
    situation.fill(num_running)
    situation.add(size - num_running, longest=1024)

    def once() -> float:
        situation.now += 0.5
        start = time.perf_counter()
        plan = situation.plan()
        seconds = time.perf_counter() - start
        situation.add(situation.answer(plan), longest=1024)
        return seconds

    return once


def _decode(policy: str, size: int, batch: int) -> Callable[[], float]:
    """Running requests, of which a batch is chosen by its limit on tokens."""
    situation = Situation(policy, max_num_seqs=size, max_num_batched_tokens=16 * size)
    situation.fill(size)
    # So many would take long to start under the limit that is measured: it is lowered behind them.
    worker = situation.scheduler._state.worker(WORKER)
    worker.spec = replace(worker.spec, max_num_batched_tokens=batch)

    def once() -> float:
        start = time.perf_counter()
        plan = situation.plan()
        seconds = time.perf_counter() - start
        situation.answer(plan)
        return seconds

    return once


SITUATIONS: dict[str, Callable[[str, int], Callable[[], float]]] = {
    "prefill": _prefill,
    "decode": lambda policy, size: _decode(policy, size, BATCH),
    "decode_all": lambda policy, size: _decode(policy, size, max(size, BATCH)),
}


def measure(
    sizes: tuple[int, ...] = SIZES, repeats: int = 40, policies: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Decision times in milliseconds: one row per policy, situation and number of candidates.

    Without ``policies``: all there are, variants left out.
    """
    rows = []
    for policy in policies or tuple(name for name in policy_names() if ":" not in name):
        num_plans = min(repeats, FEWER_REPEATS.get(policy, repeats))
        for situation, build in SITUATIONS.items():
            for size in sizes:
                once = build(policy, size)
                for _ in range(min(5, num_plans)):
                    once()
                times = sorted(1e3 * once() for _ in range(num_plans))
                rows.append(
                    {
                        "policy": policy,
                        "situation": situation,
                        "num_candidates": size,
                        "median_ms": statistics.median(times),
                        "p10_ms": times[num_plans // 10],
                        "p90_ms": times[(9 * num_plans) // 10],
                    }
                )
    return {"machine": describe_machine(), "decision_time": rows}


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="all, if left out")
    arguments = parser.parse_args()
    policies = tuple(arguments.policies) if arguments.policies else None
    result = measure(tuple(arguments.sizes), arguments.repeats, policies)
    print(json.dumps(result["machine"]))
    print(
        f"{'policy':8} {'situation':11} {'candidates':>10} {'median':>8} {'p10':>8} {'p90':>8}  ms"
    )
    for row in result["decision_time"]:
        print(
            f"{row['policy']:8} {row['situation']:11} {row['num_candidates']:10d} "
            f"{row['median_ms']:8.3f} {row['p10_ms']:8.3f} {row['p90_ms']:8.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
