"""The burst of requests, fitted to the machine: more than keys and values have memory for.

Most requests are short, some have a long prompt. How many come per second and what they ask for
follows from the scheduler's estimate of the worker's speed, so that a fast machine and a slow one
are both short of memory and not of arithmetic. With b requests in a batch, a request of P prompt
tokens and O output tokens takes of the machine's time, in the mean,

    P * per_token + P^2 / 2 * per_pair                                            for its prompt
    O * (base / b + per_token + per_sequence + (P + O / 2) * per_cached_token)    for its answer

and the memory allows b = tokens in the pool / tokens that a request holds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from aptserve.types import Tier, WorkerStatus
from aptserve.workload import Lengths, Trace, clipped, with_gamma_arrivals

_LONG_SHARE = 0.15
_SHORT_PROMPT, _LONG_PROMPT, _OUTPUT = (20, 80), (600, 850), (60, 140)
"""Tokens, from and to."""
_OVERLOAD = 1.1
"""Requests offered over those that keys and values alone have the memory to serve."""
_ARRIVAL_SHARE = 0.5
"""Part of a run during which requests arrive; the rest is for their ends."""
_MIN_REQUESTS, _MAX_REQUESTS = 20, 200
_TTFT_ANSWERS = 0.5
"""Part of the time of an average answer within which the first token should come."""
_TBT_STEPS = 30
"""Steps of a full batch that may lie between two tokens."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What is offered to both policies, and how each request is judged."""

    trace: Trace
    num_long: int
    """Requests with a long prompt."""
    ttft_seconds: float
    """Objective of the time to the first token."""
    tbt_seconds: float
    """Objective of the P99 time between tokens."""
    give_up_seconds: float
    """After so long a client goes away, and its request is missed."""
    sustainable_rate: float
    """Requests per second that the pool has memory for if it holds keys and values alone."""


@dataclass(frozen=True, slots=True)
class _Load:
    """The mean request on this worker when its pool is full of keys and values."""

    prompt_seconds: float
    """Time of the whole machine for its prompt."""
    num_steps: float
    """Steps of its answer."""
    step_seconds: float
    """Time of one, shared by the batch."""
    batch: float
    """Requests in it."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return 1 / (self.prompt_seconds + self.num_steps * self.step_seconds / self.batch)


def plan_burst(
    worker: WorkerStatus, slowdown: float, context_length: int, *, seconds: float, seed: int
) -> Burst:
    """The burst for a run of ``seconds`` on this worker; equal for equal arguments.

    ``slowdown``: what clients see of the worker's times is so many times longer. A prompt and its
    answer have at most ``context_length`` tokens.
    """
    most_tokens = min(context_length, _pool_tokens(worker))
    load = _load(_draw(_MAX_REQUESTS, most_tokens, seed), worker, slowdown)
    rate = _OVERLOAD * load.rate
    wanted = round(rate * seconds * _ARRIVAL_SHARE)
    lengths = _draw(min(max(wanted, _MIN_REQUESTS), _MAX_REQUESTS), most_tokens, seed)
    return Burst(
        trace=with_gamma_arrivals(lengths, rate, cv=1.0, seed=seed),
        num_long=_num_long(len(lengths)),
        ttft_seconds=_rounded(_TTFT_ANSWERS * load.num_steps * load.step_seconds),
        tbt_seconds=_rounded(_TBT_STEPS * load.step_seconds),
        give_up_seconds=seconds * (1 - _ARRIVAL_SHARE),
        sustainable_rate=load.rate,
    )


def _num_long(num_requests: int) -> int:
    return round(num_requests * _LONG_SHARE)


def _draw(num_requests: int, most_tokens: int, seed: int) -> Lengths:
    """Requests in random order, none longer than ``most_tokens`` with its answer."""
    import numpy as np

    rng = random.Random(seed)
    is_long = [index < _num_long(num_requests) for index in range(num_requests)]
    rng.shuffle(is_long)
    prompts = [rng.randint(*(_LONG_PROMPT if long else _SHORT_PROMPT)) for long in is_long]
    outputs = [rng.randint(*_OUTPUT) for _ in is_long]
    return clipped(Lengths("demo", np.array(prompts), np.array(outputs)), most_tokens, "cut")


def _load(lengths: Lengths, worker: WorkerStatus, slowdown: float) -> _Load:
    speed = worker.calibration
    per_cached = {tier.tier: tier.seconds_per_cached_token for tier in speed.tiers}
    prompts, outputs = lengths.num_prompt_tokens, lengths.num_output_tokens
    # A long answer is in more batches: what a batch holds is a mean over steps, not requests.
    held = float(((prompts + outputs / 2) * outputs).sum() / outputs.sum())
    batch = max(1.0, _pool_tokens(worker) / held)
    per_sequence = speed.seconds_per_token + speed.seconds_per_sequence
    pairs = speed.seconds_per_attention_pair * prompts**2 / 2
    per_request = per_sequence + per_cached.get(Tier.KV, 0.0) * held
    return _Load(
        prompt_seconds=slowdown * float((speed.seconds_per_token * prompts + pairs).mean()),
        num_steps=float(outputs.mean()),
        step_seconds=slowdown * (speed.base_seconds + batch * per_request),
        batch=batch,
    )


def _pool_tokens(worker: WorkerStatus) -> int:
    """Tokens that the pool holds as keys and values."""
    per_block = next(tier.units_per_block for tier in worker.tiers if tier.tier is Tier.KV)
    return worker.num_units // per_block * worker.block_size


def _rounded(seconds: float) -> float:
    """Two digits: an objective that people can remember."""
    return float(f"{seconds:.2g}")
