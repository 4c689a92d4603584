"""Decode steps and throughput of a model of OPT-13B's shape, through the worker's own engine.

Engines get the same prompts and sample greedily. Random weights answer what they like, so answers
are compared in number, and between the engine's own forms token by token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from aptserve_worker.engine import ModelEngine
from aptserve_worker.model.loading import LoadedModel
from aptserve_worker.plan import (
    MAX_LAUNCHED,
    BatchPlan,
    NewSequence,
    Sampling,
    ScheduledSequence,
    Tier,
)

from benchmarks.common import make_prompts
from benchmarks.gpu_check import opt_model, stand_ins, transformers_engines
from benchmarks.gpu_check.context import Context

_BATCHES, _QUICK_BATCHES, _DRY_BATCHES = (64, 1, 16, 256), (1, 64), (2,)
_PROMPT_TOKENS, _DRY_PROMPT_TOKENS = 128, 6
_STEPS, _DRY_STEPS = 16, 2
"""Of each row; a run makes one with steps launched ahead and one without."""
_REQUESTS, _DRY_REQUESTS = (64, 64), (2, 4)
"""Of the throughput: how many, and output tokens of each."""
_DRY_GRAPHS = "eager"
"""The padded steps that are recorded on a GPU."""
_PREFILL_TOKENS = 4096
"""New tokens in one step, as the service has it."""
_PROFILED_STEPS = 4
_MODEL_BYTES = 28 * 2**30
_WEIGHT_SECONDS, _ENGINE_SECONDS, _RUN_SECONDS = 25.0, 15.0, 4.0

_TIERS: dict[str, Callable[[int], Tier]] = {
    "kv": lambda _: Tier.KV,
    "hidden": lambda _: Tier.HIDDEN,
    "mixed": lambda i: (Tier.KV, Tier.HIDDEN)[i % 2],
}


def measure(context: Context) -> dict[str, Any]:
    """Step times by tier and batch, with graphs and without, steps launched ahead or each waited
    for; throughput beside transformers."""
    stand_ins.quiet()
    if not context.has_seconds(_WEIGHT_SECONDS, "all of it"):
        return {}
    if not context.is_dry and context.free_bytes() < _MODEL_BYTES:
        context.note("all of it left out: the weights do not fit the device")
        return {}
    loaded = opt_model.make_model(context.device, is_tiny=context.is_dry)
    steps: list[dict[str, Any]] = []
    throughput: list[dict[str, Any]] = []
    answers: dict[str, list[list[int]]] = {}
    num_failed = 0
    context.found = {"steps": steps, "throughput": throughput, "agreement": {}}
    for graphs in (_DRY_GRAPHS if context.is_dry else "auto", "off"):
        if not context.has_seconds(_ENGINE_SECONDS, f"an engine with graphs {graphs}"):
            continue
        try:
            _measure_engine(context, loaded, graphs, steps, throughput, answers)
        except Exception as problem:
            num_failed += 1
            text = (str(problem) or "?").strip().splitlines()[0][:300]
            context.note(f"the engine with graphs {graphs} broke: {type(problem).__name__}: {text}")
        opt_model.detach(loaded.model)
    requests, new_tokens = _DRY_REQUESTS if context.is_dry else _REQUESTS
    prompts = _prompts(context, loaded, requests)
    throughput += transformers_engines.measure(context, loaded, prompts, new_tokens)
    return {
        "steps": steps,
        "throughput": throughput,
        "agreement": _agreement(context, answers),
        "num_failed": num_failed,
    }


def _measure_engine(
    context: Context,
    loaded: LoadedModel,
    graphs: str,
    steps: list[dict[str, Any]],
    throughput: list[dict[str, Any]],
    answers: dict[str, list[list[int]]],
) -> None:
    started = time.perf_counter()
    engine = opt_model.make_engine(loaded, graphs=graphs)
    seconds = time.perf_counter() - started
    info = engine.info
    context.say(
        f"  engine with graphs {graphs}: ready after {seconds:.1f} s, {info.num_units:,} units"
    )
    batches = _QUICK_BATCHES if context.is_quick else _BATCHES
    for batch in _DRY_BATCHES if context.is_dry else batches:
        for tier in ("kv", "hidden") if graphs == "off" else _TIERS:
            if context.has_seconds(_RUN_SECONDS, f"graphs {graphs}, {tier}, batch {batch}"):
                steps += _steps(context, loaded, engine, graphs, tier, batch)
    requests, new_tokens = _DRY_REQUESTS if context.is_dry else _REQUESTS
    prompts = _prompts(context, loaded, requests)
    for tier in ("kv", "hidden"):
        name = f"apt-serve ({tier}, graphs {graphs})"
        if context.has_seconds(_RUN_SECONDS, name):
            answers[name], seconds = generate(engine, tier, prompts, new_tokens)
            throughput.append(transformers_engines.row(context, name, answers[name], seconds))


def _prompts(context: Context, loaded: LoadedModel, count: int) -> list[list[int]]:
    length = _DRY_PROMPT_TOKENS if context.is_dry else _PROMPT_TOKENS
    return make_prompts(count, length, loaded.vocab_size)


def _steps(
    context: Context, loaded: LoadedModel, engine: ModelEngine, graphs: str, tier: str, batch: int
) -> list[dict[str, Any]]:
    """A row with each step waited for, one with steps ahead; none where the pool is too small."""
    num_steps = _DRY_STEPS if context.is_dry else _STEPS
    prompts = _prompts(context, loaded, batch)
    length = len(prompts[0]) + 2 * num_steps + _PROFILED_STEPS + 1
    per_block = {t.tier: t.units_per_block for t in engine.info.tiers}
    blocks = -(-length // engine.info.block_size)
    units = blocks * sum(per_block[_TIERS[tier](i)] for i in range(batch))
    if units > engine.info.num_units or batch > engine.info.max_num_seqs:
        context.note(f"{tier}, batch {batch}: left out, the pool is too small")
        return []
    run = _Run(engine, tier, prompts, length)
    run.prefill()
    timed = {overlaps: run.steps(num_steps, overlaps=overlaps) for overlaps in (False, True)}
    busy = _busy_seconds(context.device, run)
    engine.reset()
    where = {"graphs": graphs, "tier": tier, "batch": batch}
    return [_row(context, where, overlaps, seconds, busy) for overlaps, seconds in timed.items()]


def _row(
    context: Context,
    where: dict[str, Any],
    overlaps: bool,
    seconds: Sequence[float],
    busy: float | None,
) -> dict[str, Any]:
    """``seconds`` of some steps, in each of which kernels take ``busy`` seconds."""
    median = statistics.median(seconds)
    idle_share = None if busy is None else max(0.0, 1 - busy / median)
    context.say(
        f"    graphs {where['graphs']:<5} {where['tier']:<6} batch {where['batch']:>3} "
        f"{'ahead ' if overlaps else 'waited'}: {median * 1e3:8.2f} ms a step, "
        f"{where['batch'] / median:8,.0f} tokens/s"
        + ("" if idle_share is None else f", device idle {idle_share:.0%}")
    )
    return where | {
        "overlaps": overlaps,
        "step_seconds": median,
        "low_seconds": min(seconds),
        "high_seconds": max(seconds),
        "tokens_per_second": where["batch"] / median,
        "idle_share": idle_share,
    }


class _Run:
    """Sequences of one batch, prefilled and then decoded together."""

    def __init__(
        self, engine: ModelEngine, tier: str, prompts: Sequence[list[int]], max_tokens: int
    ) -> None:
        self.answers: list[list[int]] = [[] for _ in prompts]
        self._engine, self._prompts = engine, prompts
        sampling = Sampling(max_tokens=max_tokens, seed=0, ignore_eos=True)
        self._new = [
            NewSequence(i, str(i), p, len(p), _TIERS[tier](i), sampling)
            for i, p in enumerate(prompts)
        ]
        self._num_steps = 0

    def prefill(self) -> None:
        """All prompts, in steps of as many tokens as the service allows."""
        at_once = max(1, _PREFILL_TOKENS // len(self._prompts[0]))
        for first in range(0, len(self._new), at_once):
            new = self._new[first : first + at_once]
            parts = [ScheduledSequence(n.sequence_id, 0, len(n.token_ids)) for n in new]
            self._engine.launch(BatchPlan(0, new=new, scheduled=parts))
            self._collect()

    def steps(self, count: int, *, overlaps: bool) -> list[float]:
        """One token for each, so many times; seconds from the end of a step to that of the next.

        With ``overlaps`` a step is launched before the one before it is waited for.
        """
        ahead = MAX_LAUNCHED - 1 if overlaps else 0
        seconds: list[float] = []
        num_launched = 0
        ended = time.perf_counter()
        for step in range(count):
            while num_launched < min(count, step + 1 + ahead):
                self._launch_step()
                num_launched += 1
            self._collect()
            now = time.perf_counter()
            seconds.append(now - ended)
            ended = now
        return seconds

    def _launch_step(self) -> None:
        parts = [
            ScheduledSequence(i, len(p) + self._num_steps, 1) for i, p in enumerate(self._prompts)
        ]
        self._engine.launch(BatchPlan(0, scheduled=parts))
        self._num_steps += 1

    def _collect(self) -> None:
        result = self._engine.collect()
        if result.failures:
            raise RuntimeError(f"{len(result.failures)} sequences failed: {result.failures[0][1]}")
        for output in result.outputs:
            self.answers[output.sequence_id] += output.token_ids


def generate(
    engine: ModelEngine, tier: str, prompts: Sequence[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """Answers of so many tokens each, with steps launched ahead, and the seconds for all."""
    run = _Run(engine, tier, prompts, new_tokens)
    started = time.perf_counter()
    run.prefill()
    run.steps(new_tokens - 1, overlaps=True)
    seconds = time.perf_counter() - started
    engine.reset()
    return run.answers, seconds


def _busy_seconds(device: torch.device, run: _Run) -> float | None:
    """What kernels take in a step, by the profiler; None where there is no GPU."""
    if device.type != "cuda":
        run.steps(_PROFILED_STEPS, overlaps=False)
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run.steps(_PROFILED_STEPS, overlaps=False)
    micros = sum(event.self_device_time_total for event in profile.key_averages())
    # A machine may keep its counters to itself.
    return micros * 1e-6 / _PROFILED_STEPS if micros else None


def _agreement(context: Context, answers: dict[str, list[list[int]]]) -> dict[str, float]:
    """Share of tokens before the first difference, of each against keys and values with graphs."""
    if not answers:
        return {}
    base_name, *others = answers
    found = {}
    for name in others:
        pairs = list(zip(answers[base_name], answers[name], strict=True))
        equal = sum(_common(a, b) for a, b in pairs)
        found[name] = equal / sum(len(a) for a, _ in pairs)
        context.say(f"  {name}: {found[name]:.0%} of the tokens of {base_name} until they part")
    return found


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(first))
