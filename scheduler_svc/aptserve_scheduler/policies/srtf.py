"""Preemptive shortest remaining time first: the rule of ALISE (arXiv 2410.23537).

The remaining time of a request is predicted as

    seconds to compute what it has left to compute (a prompt, or a cache that was lost)
    + expected further output tokens * seconds of a decode iteration with this request alone

by the cost model. Level p takes requests of up to ``quantum_seconds * 2^p``; every
``ageing_seconds`` since its arrival lift a request by one level. The batch is composed anew in
every iteration, from the lowest level up, by arrival within a level
(:func:`~aptserve_scheduler.policies.ranked.ranked_batch`).

Expected output lengths come from one of three predictors:

* ``history`` (policy ``srtf``): the service's own completed answers, by tokens so far and size of
  the prompt (:class:`~aptserve_scheduler.policies.prediction.OutputPredictor`). It replaces ALISE's
  search for similar prompts: the scheduler sees token ids, no text. Without history: max_tokens.
* ``oracle`` (``srtf:oracle``): ``expected_output_tokens``, taken for the truth.
* ``noisy`` (``srtf:noisy``): the same times a log-normal factor of median 1 for each request, its
  logarithm having the standard deviation ``sigma``.

The last two take max_tokens where the caller gave no guess, and one token once it is outlived.

Choices that the source leaves open, or that differ here: caches are KV only, and one whose memory
is needed is dropped and recomputed, where ALISE moves it to the host or to 8 bits. The time it
takes to recompute counts as remaining, so a request is not exchanged for one slightly shorter. A
decode iteration is predicted from the request alone, as predictions that followed the batch could
make two requests take turns at preempting each other.

A priority of n counts like n levels. Tenants are ignored. Ageing bounds the waiting: after
``(num_levels - 1) * ageing_seconds`` (and as many more as a negative priority has levels) a request
is in the lowest level, where only earlier arrivals come before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.core.types import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Candidates,
    Decision,
    Horizon,
    Policy,
    decodes_all_running,
)
from aptserve_scheduler.policies.mlfq import prefill_seconds
from aptserve_scheduler.policies.prediction import OutputPredictor, reaching
from aptserve_scheduler.policies.ranked import Everyone, FirstInLine, ranked_batch

Predictor = Literal["history", "oracle", "noisy"]
_LEAST_SECONDS = 1e-9
_ROUNDING_SECONDS = 1e-6
_LOOKAHEAD = np.arange(1, 17)[:, None]
"""[k, 1] further tokens for which a decision is compared with those that follow it."""


@dataclass(frozen=True, slots=True)
class SrtfConfig:
    """Settings of the policy; ValueError names a field out of range."""

    predictor: Predictor = "history"
    quantum_seconds: float = 0.25
    """Longest remaining time in the lowest level; each further level has twice that."""
    num_levels: int = 10
    ageing_seconds: float = 10.0
    """Time since arrival that lifts by one level."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of the noise of ``noisy``."""
    seed: int = 0
    """Of that noise, which follows the order of arrivals."""

    def __post_init__(self) -> None:
        if self.predictor not in get_args(Predictor):
            known = ", ".join(get_args(Predictor))
            raise ValueError(f"predictor must be one of {known}, not {self.predictor!r}")
        for name in ("quantum_seconds", "ageing_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if not 1 <= self.num_levels <= 48:
            raise ValueError(f"num_levels must be from 1 to 48, not {self.num_levels}")
        if not self.sigma >= 0:
            raise ValueError(f"sigma must not be negative, not {self.sigma}")


class SrtfPolicy(Policy):
    """Shortest predicted remaining time first, with ageing; KV tier only."""

    def __init__(self, config: SrtfConfig | None = None) -> None:
        self.config = config or SrtfConfig()
        predictor = self.config.predictor
        self.name = "srtf" if predictor == "history" else f"srtf:{predictor}"
        self.is_oracle = predictor != "history"
        self.needs_history = predictor != "oracle"
        self._history = OutputPredictor()
        self._noise = np.random.default_rng(self.config.seed)
        self._log_factor = np.zeros(0, np.float64)
        self._waiting_levels = np.zeros(0, np.int64)
        """Of the latest decision."""

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """Whom to serve, from the lowest level up."""
        everyone, cost = Everyone(problem), problem.cost
        remaining = _compute_seconds(everyone, cost) + self._decode_seconds(everyone, cost)
        levels = self._levels(everyone, remaining)
        self._waiting_levels = levels[len(problem.running) :]
        return ranked_batch(problem, everyone, levels)

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """As long as all running decode and the first in line does not fit.

        That is, until those who run are expected to take longer for the tokens they got, or
        somebody who waits comes before it by ageing. Ageing keeps those who run where they are.
        """
        if not decodes_all_running(problem, decision):
            return THIS_ITERATION
        if not len(problem.waiting):
            return Horizon()
        first = FirstInLine.of(problem, self._waiting_levels)
        num_later = self._num_decodes_before_it(problem, first)
        until = problem.now + self._seconds_to_lift(problem.waiting, first) - _ROUNDING_SECONDS
        return Horizon(1 + num_later, until)

    def arrived(self, arrival: Arrival) -> None:
        """Draw the error of its prediction, or note the size of its prompt."""
        if self.config.predictor == "noisy":
            self._log_factor = reaching(self._log_factor, arrival.slot)
            self._log_factor[arrival.slot] = self._noise.normal(0.0, self.config.sigma)
        else:
            self._history.arrived(arrival)

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        """Learn from its length."""
        if self.config.predictor == "history":
            self._history.ended(slot, num_output_tokens, completed=completed)

    def _num_decodes_before_it(self, problem: BatchProblem, first: FirstInLine) -> float:
        """Further tokens for which those before the first in line leave it no room.

        Their levels are those of now or, by ageing, lower.
        """
        running = problem.running
        ahead = self._levels(running, self._decode_seconds(running, problem.cost, _LOOKAHEAD))
        is_behind = ahead >= first.levels_behind()
        falls_behind = np.where(is_behind.any(axis=0), is_behind.argmax(axis=0), np.inf)
        return min(first.fits_at(falls_behind), len(_LOOKAHEAD))

    def _seconds_to_lift(self, waiting: Candidates, first: FirstInLine) -> float:
        """Time until somebody who waits may come first by the next level, or anyone by two."""
        ageing = self.config.ageing_seconds
        rivals = first.overtakers(np.maximum(self._waiting_levels - 1, 0))
        seconds = ageing - waiting.age_seconds[rivals] % ageing
        return float(seconds.min(initial=ageing))

    def _levels(self, candidates: Candidates, remaining_seconds: Floats) -> Ints:
        """[..., n] level of each by its remaining time [..., n]."""
        config = self.config
        quanta = np.maximum(remaining_seconds, _LEAST_SECONDS) / config.quantum_seconds
        lifts = np.floor(candidates.age_seconds / config.ageing_seconds) + candidates.priorities
        highest = config.num_levels - 1
        levels = np.minimum(np.maximum(np.ceil(np.log2(quanta)), 0), highest) - lifts
        return np.minimum(np.maximum(levels, 0), highest).astype(np.int64)

    def _decode_seconds(
        self, candidates: Candidates, cost: CostCoefficients, num_more: Ints | int = 0
    ) -> Floats:
        """[n] time for the expected further tokens; [k, n] after ``num_more`` [k, 1] of them."""
        per_cached = cost.seconds_per_cached_token.get(Tier.KV, 0.0)
        decode = cost.base_seconds + cost.seconds_per_token + cost.seconds_per_sequence
        per_token = decode + per_cached * (candidates.num_tokens + num_more)
        seconds: Floats = per_token * self._remaining_tokens(candidates, num_more)
        return seconds

    def _remaining_tokens(self, candidates: Candidates, num_more: Ints | int) -> Floats:
        num_output = candidates.num_output_tokens + num_more
        num_prompt = candidates.num_prompt_tokens
        most = candidates.max_num_tokens - num_prompt - num_output
        if self.config.predictor == "history":
            return self._history.remaining(num_output, num_prompt, most)
        guess = candidates.expected_output_tokens.astype(np.float64)
        if self.config.predictor == "noisy" and len(candidates):
            self._log_factor = reaching(self._log_factor, int(candidates.slots.max()))
            guess = guess * np.exp(self._log_factor[candidates.slots])
        has_guess = candidates.expected_output_tokens > 0
        tokens: Floats = np.where(has_guess, np.minimum(guess - num_output, most), most)
        return np.maximum(tokens, 1.0)


def _compute_seconds(candidates: Candidates, cost: CostCoefficients) -> Floats:
    """[n] time to compute what each has left to compute, a prompt or a cache that was lost.

    A single token is the decode iteration that samples the first of the expected ones.
    """
    seconds: Floats = prefill_seconds(cost, candidates) * (candidates.num_remaining_tokens > 1)
    return seconds
