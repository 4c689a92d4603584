"""Attainment on a pool that is too small: first come, first served against the hybrid cache.

The real scheduler core plans for the real engine in one process, in real time. A request is good
if it meets both objectives; one that is not done when its run ends is not.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from aptserve.workload import Trace, load_workload
from aptserve.workload.trace import trace_of
from aptserve_scheduler import core
from aptserve_scheduler.core import Objectives, RequestFinished, Scheduler, SchedulerConfig
from aptserve_scheduler.policies import create_policy
from aptserve_worker import plan as worker
from aptserve_worker.engine import ModelEngine

from benchmarks.common import make_prompts
from benchmarks.gpu_check import opt_model, stand_ins
from benchmarks.gpu_check.context import Context, Deadline

_SYSTEMS = (("fcfs", ("kv",)), ("apt-slo", ("kv", "hidden")))
_TIMES, _DRY_TIMES = (1.0, 1.5, 0.7), (1.0,)
"""Rates over the one that keys and values alone have the memory for."""
_POOL_TOKENS, _DRY_POOL_TOKENS = 10_000, 128
"""As keys and values."""
_ARRIVAL_SECONDS = 12.0
_MOST_SECONDS = 20.0
"""Of one run, what is left over then is given up."""
_OBJECTIVES = Objectives(ttft_seconds=1.0, tbt_seconds=1.0)
"""Of the paper for OPT-13B and these lengths."""
_LONGEST_REQUEST = 512
"""Prompt and output: short enough that many begin and end within a run."""
_MODEL_SECONDS = 25.0
_WORKER_ID = core.WorkerId("gpu")
_SEED = 1


def measure(context: Context) -> dict[str, Any]:
    """A row for each system and rate."""
    stand_ins.quiet()
    if not context.has_seconds(_MODEL_SECONDS, "all of it"):
        return {}
    loaded = opt_model.make_model(context.device, is_tiny=context.is_dry)
    pool_tokens = _DRY_POOL_TOKENS if context.is_dry else _POOL_TOKENS
    units = pool_tokens // 16 * 2  # OPT has one unit for keys and one for values
    engine = opt_model.make_engine(loaded, pool_units=units, calibrate=not context.is_dry)
    base_rate = _sustainable_rate(engine, _trace(context, 1.0))
    context.say(f"  pool of {pool_tokens:,} tokens, sustains {base_rate:.2f} requests/s")
    rows: list[dict[str, Any]] = []
    context.found = {
        "pool_tokens": pool_tokens,
        "objectives_seconds": [_OBJECTIVES.ttft_seconds, _OBJECTIVES.tbt_seconds],
        "rows": rows,
    }
    for times in _DRY_TIMES if context.is_dry else _TIMES[: 2 if context.is_quick else 3]:
        trace = _trace(context, times * base_rate)
        for policy, tiers in _SYSTEMS:
            if context.has_seconds(_MOST_SECONDS, f"{policy} at {times:g} times that"):
                deadline = context.deadline.within(_MOST_SECONDS)
                rows.append(_play(engine, trace, policy, tiers, deadline))
                rows[-1] |= {"times": times, "requests_per_second": times * base_rate}
                _say(context, rows[-1])
    opt_model.detach(loaded.model)
    return context.found


def _trace(context: Context, rate: float) -> Trace:
    """Requests of ShareGPT's lengths that arrive for a few seconds at this rate."""
    if context.is_dry:
        arrivals, prompts, outputs = np.array([0.0, 0.1]), np.array([6, 17]), np.array([3, 2])
        return trace_of("tiny", arrivals, prompts, outputs, "")
    return load_workload(
        "sharegpt",
        num_requests=max(10, min(500, round(rate * _ARRIVAL_SECONDS))),
        seed=_SEED,
        max_total_tokens=_LONGEST_REQUEST,
        rate=rate,
        cv=1.0,
    )


def _sustainable_rate(engine: ModelEngine, trace: Trace) -> float:
    """Requests per second whose keys and values, held from prompt to end, fill the pool."""
    info = engine.info
    tokens = info.num_units // 2 * info.block_size
    held = float((trace.num_prompt_tokens + trace.num_output_tokens / 2).mean())
    in_memory = tokens / held
    cost = info.calibration
    kv_seconds = next(t.seconds_per_cached_token for t in info.tiers if t.tier is worker.Tier.KV)
    step = cost.base_seconds + in_memory * (cost.seconds_per_sequence + cost.seconds_per_token)
    step += tokens * kv_seconds
    return in_memory / (float(trace.num_output_tokens.mean()) * step)


def _say(context: Context, row: dict[str, Any]) -> None:
    context.say(
        f"    {row['policy']:<8} {','.join(row['tiers']):<10} {row['requests_per_second']:6.2f} "
        f"requests/s: {row['attainment']:.0%} of {row['num_requests']} good, "
        f"{row['num_steps']:,} steps, {row['idle_share']:.0%} idle"
    )


def _play(
    engine: ModelEngine, trace: Trace, policy: str, tiers: tuple[str, ...], deadline: Deadline
) -> dict[str, Any]:
    run = _Live(engine, trace, policy, tiers)
    run.play(deadline)
    engine.reset()
    good = sum(done.timing.objectives_met and done.error is None for done in run.finished)
    return {
        "policy": policy,
        "tiers": list(tiers),
        "num_requests": len(trace),
        "num_finished": len(run.finished),
        "attainment": good / len(trace),
        "num_steps": run.num_steps,
        "seconds": run.seconds,
        "idle_share": 1 - run.step_seconds / run.seconds,
    }


class _Live:
    """A trace played in real time: plan, run, apply, one after the other."""

    def __init__(
        self, engine: ModelEngine, trace: Trace, policy: str, tiers: tuple[str, ...]
    ) -> None:
        self._engine = engine
        self._arrivals = deque(enumerate(trace.arrival_seconds.tolist()))
        self._trace = trace
        self._scheduler = Scheduler(SchedulerConfig(pipeline_depth=1), create_policy(policy))
        self._scheduler.add_worker(_spec(engine, tiers), 0.0)
        self.finished: list[RequestFinished] = []
        self.num_steps = 0
        self.step_seconds = 0.0
        self.seconds = 0.0

    def play(self, deadline: Deadline) -> None:
        """Until every request has ended, or the time is up."""
        started = time.perf_counter()
        while len(self.finished) < len(self._trace) and deadline.left() > 0:
            now = time.perf_counter() - started
            self._take_arrivals(now)
            plan = self._scheduler.plan(_WORKER_ID, now)
            if plan is None:
                next_at = self._arrivals[0][1] if self._arrivals else now + 0.001
                time.sleep(max(0.0, min(0.01, next_at - now)))
                continue
            result = self._run(plan)
            self._note(self._scheduler.apply(_WORKER_ID, result, time.perf_counter() - started))
        self.seconds = time.perf_counter() - started

    def _take_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][1] <= now:
            index, at = self._arrivals.popleft()
            length = int(self._trace.num_prompt_tokens[index])
            spec = core.RequestSpec(
                request_id=core.RequestId(str(index)),
                prompt_token_ids=make_prompts(1, length, self._engine.info.vocab_size)[0],
                max_tokens=int(self._trace.num_output_tokens[index]),
                objectives=_OBJECTIVES,
            )
            self._note(self._scheduler.add_request(spec, at))

    def _run(self, plan: core.BatchPlan) -> core.StepResult:
        started = time.perf_counter()
        output = self._engine.execute(_to_worker(plan))
        seconds = time.perf_counter() - started
        self.num_steps += 1
        self.step_seconds += seconds
        return _from_worker(plan, output, seconds)

    def _note(self, events: list[core.Event]) -> None:
        self.finished += [event for event in events if isinstance(event, RequestFinished)]


def _spec(engine: ModelEngine, tiers: tuple[str, ...]) -> core.WorkerSpec:
    info = engine.info
    offered = [tier for tier in info.tiers if tier.tier.name.lower() in tiers]
    cost = info.calibration
    return core.WorkerSpec(
        worker_id=_WORKER_ID,
        num_units=info.num_units,
        block_size=info.block_size,
        tiers=tuple(core.TierSpec(core.Tier(t.tier), t.units_per_block) for t in offered),
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        cost=core.CostCoefficients(
            base_seconds=cost.base_seconds,
            seconds_per_token=cost.seconds_per_token,
            seconds_per_sequence=cost.seconds_per_sequence,
            seconds_per_attention_pair=cost.seconds_per_attention_pair,
            seconds_per_cached_token={
                core.Tier(t.tier): t.seconds_per_cached_token for t in offered
            },
        ),
    )


def _to_worker(plan: core.BatchPlan) -> worker.BatchPlan:
    return worker.BatchPlan(
        plan_id=plan.plan_id,
        release=plan.release,
        promote=plan.promote,
        new=[
            worker.NewSequence(
                new.sequence_id,
                new.request_id,
                list(new.token_ids),
                new.num_prompt_tokens,
                worker.Tier(new.tier),
                worker.Sampling(max_tokens=new.max_tokens, seed=0, ignore_eos=True),
            )
            for new in plan.new
        ],
        scheduled=[
            worker.ScheduledSequence(s.sequence_id, s.num_computed_tokens, s.num_new_tokens)
            for s in plan.scheduled
        ],
    )


def _from_worker(
    plan: core.BatchPlan, output: worker.StepOutput, seconds: float
) -> core.StepResult:
    return core.StepResult(
        plan_id=plan.plan_id,
        outputs=tuple(
            core.SequenceOutput(
                core.SequenceId(o.sequence_id),
                o.token_ids,
                None if o.finish_reason is None else core.FinishReason(o.finish_reason.value),
            )
            for o in output.outputs
        ),
        step_seconds=seconds,
        num_free_units=output.num_free_units,
        skipped=tuple(map(core.SequenceId, output.skipped)),
        failures=tuple(
            core.SequenceFailure(core.SequenceId(i), text) for i, text in output.failures
        ),
    )
