"""Work before the burst: the service learns its worker's speed, and we what clients see of it."""

from __future__ import annotations

import asyncio
import statistics
import time

from aptserve import AsyncClient, SamplingParams
from aptserve.types import Calibration

_PROMPTS = (16, 128, 512)
"""Tokens of prompts that are run one by one."""
_BATCH, _BATCH_PROMPT, _BATCH_OUTPUT = 8, 16, 24
"""A batch that is timed: its requests, and the tokens of each."""
_NUM_BATCHES = 3
_TIMEOUT_SECONDS = 60.0
"""Of each request."""


async def warm_up(client: AsyncClient) -> float:
    """Run batches of different make-up; the median seconds of those that were timed."""
    for num_prompt_tokens in _PROMPTS:
        await _ask(client, num_prompt_tokens)
    return statistics.median([await _time_batch(client) for _ in range(_NUM_BATCHES)])


def slowdown(batch_seconds: float, speed: Calibration) -> float:
    """How much longer the timed batch took than by the worker's own figures; 1 at least.

    Clients and scheduler need processors as well, and the machine may have other things to do.
    """
    prefill = speed.base_seconds + _BATCH * (
        _BATCH_PROMPT * speed.seconds_per_token + speed.seconds_per_sequence
    )
    step = speed.base_seconds + _BATCH * (speed.seconds_per_token + speed.seconds_per_sequence)
    return max(1.0, batch_seconds / max(prefill + (_BATCH_OUTPUT - 1) * step, 1e-9))


async def _time_batch(client: AsyncClient) -> float:
    started = time.monotonic()
    await asyncio.gather(*(_ask(client, _BATCH_PROMPT) for _ in range(_BATCH)))
    return time.monotonic() - started


async def _ask(client: AsyncClient, num_prompt_tokens: int) -> None:
    await client.complete(
        token_ids=[0] * num_prompt_tokens,
        sampling=SamplingParams(max_tokens=_BATCH_OUTPUT, ignore_eos=True),
        timeout=_TIMEOUT_SECONDS,
    )
