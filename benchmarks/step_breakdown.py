"""Where the time of a decode step goes: matrix products, attention, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from aptserve_kernels.linear import PackedLinear
from aptserve_worker.config import WorkerSettings
from aptserve_worker.engine import ModelEngine, build_engine
from aptserve_worker.model.attention import LayerAttention
from aptserve_worker.plan import BatchPlan, NewSequence, Sampling, ScheduledSequence, Tier

from benchmarks.common import describe_machine, make_prompts, save_opt_125m, spread

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128
STEPS = 24


def measure(folder: Path) -> dict[str, Any]:
    """Milliseconds per decode step by part; the OPT-125m shape, KV and hidden tier."""
    torch.set_num_threads(2)
    engine = build_engine(
        WorkerSettings(
            model=str(save_opt_125m(folder)),
            calibrate=False,
            pool_units=2000,
            max_num_seqs=64,
            num_threads=2,
        )
    )
    parts = {
        f"{tier.name.lower()}, batch {batch}": _measure(engine, tier, batch)
        for tier in (Tier.KV, Tier.HIDDEN)
        for batch in BATCHES
    }
    return {"machine": describe_machine(), "milliseconds": parts}


def _measure(engine: ModelEngine, tier: Tier, batch: int) -> dict[str, Any]:
    sampling = Sampling(max_tokens=STEPS + 8, seed=0, ignore_eos=True)
    prompts = make_prompts(batch, PROMPT_TOKENS)
    new = [NewSequence(i, str(i), p, len(p), tier, sampling) for i, p in enumerate(prompts)]
    parts = [ScheduledSequence(i, 0, PROMPT_TOKENS) for i in range(batch)]
    engine.execute(BatchPlan(0, new=new, scheduled=parts))
    whole: list[float] = []
    linear: list[float] = []
    attention: list[float] = []
    for step in range(STEPS):
        plan = BatchPlan(
            step + 1,
            scheduled=[ScheduledSequence(i, PROMPT_TOKENS + step, 1) for i in range(batch)],
        )
        with (
            _timed(PackedLinear, "forward") as in_linear,
            _timed(LayerAttention, "__call__") as in_attention,
        ):
            started = time.perf_counter()
            engine.execute(plan)
            whole.append((time.perf_counter() - started) * 1e3)
        linear.append(sum(in_linear) * 1e3)
        attention.append(sum(in_attention) * 1e3)
    engine.reset()
    rest = [w - p - a for w, p, a in zip(whole, linear, attention, strict=True)]
    return {
        "step": spread(whole),
        "matrix products": spread(linear),
        "attention": spread(attention),
        "rest": spread(rest),
    }


@contextmanager
def _timed(owner: type, method: str) -> Iterator[list[float]]:
    """Collect the seconds of every call of ``owner.method`` while the context is open."""
    original: Callable[..., Any] = getattr(owner, method)
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(owner, method, timed)
    try:
        yield seconds
    finally:
        setattr(owner, method, original)
