"""The linear estimate that a worker would find at start-up, fitted to its true cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Ints, Tiers
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.core.cost import features
from aptserve_scheduler.sim.worker import StepCost

_CHUNKS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
_CONTEXTS = (16, 128, 512, 1024, 2048)
_BATCHES = (1, 4, 16, 64, 128, 256)

Batch = tuple[Ints, Ints, Tiers]
"""Cached tokens, new tokens and tiers of an iteration's entries."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A linear form and how far it is from the truth on the batches it was fitted to."""

    coefficients: CostCoefficients
    median_error: float
    """Relative, as is the next."""
    p90_error: float


def fit_estimate(
    cost: StepCost,
    tiers: Sequence[Tier],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_cached_tokens: int,
) -> Estimate:
    """Non-negative least squares of relative errors over prefills and decodes within the limits."""
    from scipy.optimize import nnls

    batches = [
        batch
        for batch in _grid(tiers)
        if len(batch[0]) <= max_num_seqs
        and batch[1].sum() <= max_num_batched_tokens
        and batch[0].sum() <= max_cached_tokens
    ]
    seconds = np.array([cost.seconds(*batch) for batch in batches])
    rows = np.array([features(*batch, tuple(tiers)) for batch in batches]) / seconds[:, None]
    scale = rows.max(axis=0)
    scale[scale == 0.0] = 1.0
    solution = nnls(rows / scale, np.ones(len(rows)))[0] / scale
    errors = np.abs(rows @ solution - 1.0)
    base, token, sequence, pair, *cached = solution.tolist()
    return Estimate(
        CostCoefficients(base, token, sequence, pair, dict(zip(tiers, cached, strict=True))),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
    )


def _grid(tiers: Sequence[Tier]) -> Iterator[Batch]:
    for chunk in _CHUNKS:
        for context in (0, *_CONTEXTS):
            yield _batch([context], [chunk], Tier.KV)
        for count in (2, 4, 8):
            yield _batch([0] * count, [max(2, chunk // count)] * count, Tier.KV)
    for tier in tiers:
        for count in _BATCHES:
            for context in _CONTEXTS:
                yield _batch([context] * count, [1] * count, tier)
                yield _batch([context] * count + [0], [1] * count + [512], tier)


def _batch(num_cached: list[int], num_new: list[int], tier: Tier) -> Batch:
    tiers = np.full(len(num_cached), tier, np.int8)
    return np.array(num_cached, np.int64), np.array(num_new, np.int64), tiers
