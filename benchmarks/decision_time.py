"""How long the scheduler takes to compose one plan, by policy and number of candidates.

    python -m benchmarks.decision_time [--json OUT] [--repeats N] [--sizes 50 400 1600 16000]

Times ``Scheduler.plan()`` as a whole: building the problem from the request table, the policy,
checking its decision, entering it in the books and making the plan. Three situations, each with as
many candidates as stated:

* ``prefill``: up to 128 run, the others wait; a batch of at most 256 is put together from them
  within the free memory.
* ``decode``: all run, a batch of 256 is chosen.
* ``decode_all``: all run and all are in the batch.

After each plan its result is applied and the requests that ended are replaced, so every plan is
composed from a like situation. The garbage collector stays on.
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
from aptserve_scheduler.policies import create_policy

from benchmarks.common import describe_machine

SIZES = (50, 400, 1600, 16000)
POLICIES = ("apt", "fcfs")
BATCH = 256
NUM_RUNNING = 128
BLOCK_SIZE = 16
WORKER = WorkerId("bench")
_UNLIMITED_UNITS = 10**9
_PROMPT = tuple(range(2048))


class Situation:
    """A scheduler with one worker, whose plans are answered at once."""

    def __init__(
        self, policy: str, *, num_units: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(SchedulerConfig(1, 10**6), create_policy(policy))
        self._random = random.Random(7)
        self._num_added = 0
        seconds = {Tier.KV: 1e-7, Tier.HIDDEN: 1.3e-7}
        self.scheduler.add_worker(
            WorkerSpec(
                worker_id=WORKER,
                num_units=num_units,
                block_size=BLOCK_SIZE,
                tiers=(TierSpec(Tier.KV, 2), TierSpec(Tier.HIDDEN, 1)),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                cost=CostCoefficients(5e-3, 2e-5, 1e-5, 1e-9, seconds),
            ),
            self.now,
        )

    def add(self, num_requests: int, longest: int) -> None:
        """Requests with prompts of 4 to ``longest`` tokens, half of them past their objective."""
        for _ in range(num_requests):
            self._num_added += 1
            self.now += 1e-5
            length = min(longest, 4 + int(self._random.lognormvariate(4.5, 1.0)))
            self.scheduler.add_request(
                RequestSpec(
                    request_id=RequestId(f"request-{self._num_added}"),
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

    def answer(self, plan: BatchPlan, *, end_new: bool) -> int:
        """Give each sequence a token; ends those that are new if asked to, returns how many."""
        new = {sequence.sequence_id for sequence in plan.new}
        ended = new if end_new else set()
        outputs = tuple(
            SequenceOutput(
                entry.sequence_id,
                (7,),
                FinishReason.STOP if entry.sequence_id in ended else None,
            )
            for entry in plan.scheduled
        )
        self.now += 0.01
        self.scheduler.apply(WORKER, StepResult(plan.plan_id, outputs, 0.01), self.now)
        return len(ended)


def _prefill(policy: str, size: int) -> Callable[[], float]:
    """Waiting requests against memory that holds a part of the batch."""
    num_running = min(size // 4, NUM_RUNNING)
    situation = Situation(
        policy, num_units=_UNLIMITED_UNITS, max_num_seqs=BATCH, max_num_batched_tokens=4096
    )
    situation.add(num_running, longest=16)
    situation.answer(situation.plan(), end_new=False)
    situation.add(size - num_running, longest=1024)

    def once() -> float:
        situation.now += 0.5
        start = time.perf_counter()
        plan = situation.plan()
        seconds = time.perf_counter() - start
        situation.add(situation.answer(plan, end_new=bool(plan.new)), longest=1024)
        return seconds

    return once


def _decode(policy: str, size: int, batch: int) -> Callable[[], float]:
    """Running requests, of which a batch is chosen by its limit on sequences."""
    situation = Situation(
        policy,
        num_units=_UNLIMITED_UNITS,
        max_num_seqs=size,
        max_num_batched_tokens=16 * size,
    )
    situation.add(size, longest=16)
    while situation.scheduler.snapshot(situation.now).num_waiting:
        situation.answer(situation.plan(), end_new=False)
    # More run than a batch takes: no worker starts like that, so its limit is lowered behind it.
    worker = situation.scheduler._state.worker(WORKER)
    worker.spec = replace(worker.spec, max_num_seqs=batch)

    def once() -> float:
        start = time.perf_counter()
        plan = situation.plan()
        seconds = time.perf_counter() - start
        situation.answer(plan, end_new=False)
        return seconds

    return once


SITUATIONS: dict[str, Callable[[str, int], Callable[[], float]]] = {
    "prefill": _prefill,
    "decode": lambda policy, size: _decode(policy, size, BATCH),
    "decode_all": lambda policy, size: _decode(policy, size, max(size, BATCH)),
}


def measure(sizes: tuple[int, ...] = SIZES, repeats: int = 40) -> dict[str, Any]:
    """Decision times in milliseconds: one row per policy, situation and number of candidates."""
    rows = []
    for policy in POLICIES:
        for situation, build in SITUATIONS.items():
            for size in sizes:
                once = build(policy, size)
                for _ in range(5):
                    once()
                times = sorted(1e3 * once() for _ in range(repeats))
                rows.append(
                    {
                        "policy": policy,
                        "situation": situation,
                        "num_candidates": size,
                        "median_ms": statistics.median(times),
                        "p10_ms": times[repeats // 10],
                        "p90_ms": times[(9 * repeats) // 10],
                    }
                )
    return {"machine": describe_machine(), "decision_time": rows}


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    result = measure(tuple(arguments.sizes), arguments.repeats)
    print(json.dumps(result["machine"]))
    print(
        f"{'policy':6} {'situation':11} {'candidates':>10} {'median':>8} {'p10':>8} {'p90':>8}  ms"
    )
    for row in result["decision_time"]:
        print(
            f"{row['policy']:6} {row['situation']:11} {row['num_candidates']:10d} "
            f"{row['median_ms']:8.3f} {row['p10_ms']:8.3f} {row['p90_ms']:8.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
