"""How long an iteration takes: a linear form that starts from the worker's calibration and learns.

    seconds = base + per_token * new tokens + per_sequence * sequences
            + per_attention_pair * sum n (c + n/2)      over entries of n > 1 tokens on c cached
            + sum over tiers per_cached_token * c       over entries of one token

The estimator is a Kalman filter with a random walk on the coefficients, which is recursive least
squares with forgetting, written so that it stays bounded when iterations are all alike. Each row
is divided by its prediction, so errors are relative and long iterations do not rule short ones.
"""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints, Tiers
from aptserve_scheduler.core.types import CostCoefficients, Tier

_NOISE = 0.1
"""Relative standard deviation of one measured iteration."""
_DRIFT = 1e-4
"""Variance by which a coefficient, relative to its start, may wander per iteration."""
_START_VARIANCE = 0.25
"""Variance of the worker's own calibration; also the most that is ever admitted."""
_LARGEST_ERROR = 3 * _NOISE
"""Relative errors are cut here, so one stall moves the estimate no further than a slow step."""
_UNMEASURED_SECONDS = 1e-9
"""Scale of a coefficient that the worker advertised as zero, per unit of its feature."""


def features(
    num_cached: Ints, num_new: Ints, tiers: Tiers, known_tiers: tuple[Tier, ...]
) -> Floats:
    """Row of the linear form for a batch; entries are parallel arrays.

    Returns ``[1, new tokens, sequences, attention pairs, cached tokens by tier...]``.
    """
    one = num_new == 1
    many = ~one
    pairs = num_new[many] * (num_cached[many] + 0.5 * num_new[many])
    cached = [float(num_cached[one & (tiers == tier)].sum()) for tier in known_tiers]
    return np.array([1.0, num_new.sum(), len(num_new), pairs.sum(), *cached], np.float64)


class CostModel:
    """Coefficients of one worker, refined by each measured iteration; never negative."""

    def __init__(self, start: CostCoefficients, tiers: tuple[Tier, ...]) -> None:
        self.tiers = tiers
        per_cached = [start.seconds_per_cached_token.get(tier, 0.0) for tier in tiers]
        theta = np.array(
            [
                start.base_seconds,
                start.seconds_per_token,
                start.seconds_per_sequence,
                start.seconds_per_attention_pair,
                *per_cached,
            ],
            np.float64,
        )
        if not np.all(np.isfinite(theta)) or np.any(theta < 0):
            raise ValueError(f"cost coefficients must be finite and >= 0, not {start}")
        # The filter's state is the factor on each starting value, about 1.
        self._scale = np.where(theta > 0, theta, _UNMEASURED_SECONDS)
        self._factors = theta / self._scale
        self._covariance = _START_VARIANCE * np.eye(len(theta))
        self._coefficients = start

    @property
    def coefficients(self) -> CostCoefficients:
        """Present estimate."""
        return self._coefficients

    def seconds(self, row: Floats) -> float:
        """Predicted time of a batch with these :func:`features`."""
        return float(row @ (self._scale * self._factors))

    def observe(self, row: Floats, seconds: float) -> None:
        """Learn from an iteration that took ``seconds``; impossible times are ignored."""
        predicted = self.seconds(row)
        if not np.isfinite(seconds) or seconds <= 0:
            return
        reference = max(predicted, _UNMEASURED_SECONDS)
        x = row * self._scale / reference
        error = np.clip(
            seconds / reference - predicted / reference, -_LARGEST_ERROR, _LARGEST_ERROR
        )
        spread = self._covariance @ x
        gain = spread / (x @ spread + _NOISE**2)
        self._factors = np.maximum(self._factors + gain * error, 0.0)
        self._covariance -= np.outer(gain, spread)
        self._admit_drift()
        self._coefficients = self._as_coefficients()

    def _admit_drift(self) -> None:
        covariance = self._covariance
        covariance += _DRIFT * np.eye(len(covariance))
        # Directions that no iteration shows would grow without end; scale them back.
        excess = np.sqrt(np.minimum(1.0, _START_VARIANCE / np.diagonal(covariance)))
        self._covariance = 0.5 * (covariance + covariance.T) * np.outer(excess, excess)

    def _as_coefficients(self) -> CostCoefficients:
        base, token, sequence, pair, *cached = (self._scale * self._factors).tolist()
        return CostCoefficients(
            base_seconds=base,
            seconds_per_token=token,
            seconds_per_sequence=sequence,
            seconds_per_attention_pair=pair,
            seconds_per_cached_token=dict(zip(self.tiers, cached, strict=True)),
        )
