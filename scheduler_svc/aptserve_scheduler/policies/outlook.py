"""What a decision goes by: sizes, speeds, expected lengths, and the memory that will come free."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, computed_once
from aptserve_scheduler.policies.base import BatchProblem
from aptserve_scheduler.policies.prediction import OutputPredictor
from aptserve_scheduler.policies.slack import prompt_seconds
from aptserve_scheduler.policies.tier_rates import TierRates

LONG_SECONDS = 60.0
"""Slack beyond this is all the same."""
_FORECAST_SECONDS = np.array([0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
_SOON_TOKENS = 64
"""Memory is plentiful when it lasts for so many more tokens of everybody."""
_NO_TOKENS = np.zeros(1, np.int64)


class Outlook:
    """Estimates about everybody in one problem; what few decisions need is computed when asked for.

    Names with ``waiting_`` and ``first_`` are about ``problem.waiting``, the others about
    ``problem.running``.
    """

    def __init__(self, problem: BatchProblem, rates: TierRates, history: OutputPredictor) -> None:
        running, waiting, cost = problem.running, problem.waiting, problem.cost
        self._problem, self._history = problem, history
        self.rates = rates
        self.remaining = running.num_remaining_tokens
        """[n] tokens to compute until the next one is sampled."""
        self.decodes: Bools = running.schedulable & (self.remaining == 1)
        """[n] who could get a token in this iteration, for one computed."""
        self.num_decodes = int(np.count_nonzero(self.decodes))
        self.step_seconds = self._step_seconds()
        """Time of a decode of all that are ready."""
        next_tokens = np.minimum(self.remaining, problem.max_num_batched_tokens)
        ends = self.units_for(running.num_computed_tokens + next_tokens, running.tiers)
        self.growth: Ints = (ends - running.num_units) * running.schedulable
        """[n] units that the largest possible next chunk takes."""

        self.waiting_prefill = prompt_seconds(cost, _NO_TOKENS, waiting.num_tokens)
        """[n] seconds of a whole prompt, alone."""
        slack = waiting.miss_after_seconds - waiting.pending_seconds
        self.waiting_slack = np.minimum(slack, LONG_SECONDS)
        """[n] seconds until an objective is missed."""
        self.waiting_is_late: Bools = slack < self.waiting_prefill + cost.base_seconds
        """[n] who would miss an objective even if the prompt ran at once and alone."""

    def units_for(self, num_tokens: Ints, tiers: Tiers) -> Ints:
        """[n] units of caches of these lengths in these tiers."""
        return self._problem.num_blocks(num_tokens) * self.rates.units_per_block[tiers]

    @computed_once
    def _units_per_token(self) -> Floats:
        """By tier number."""
        return self.rates.units_per_block / self._problem.block_size

    def _step_seconds(self) -> float:
        cost, running = self._problem.cost, self._problem.running
        cached = self.rates.seconds_per_cached[running.tiers] * running.num_computed_tokens
        per_sequence = cost.seconds_per_token + cost.seconds_per_sequence
        seconds = cost.base_seconds + per_sequence * self.num_decodes
        return max(seconds + float(np.add.reduce(cached[self.decodes])), 1e-9)

    # Lengths and costs

    @property
    def tokens_to_come(self) -> Floats:
        """[n] expected further output tokens."""
        return self._everybodys_tokens_to_come[: len(self._problem.running)]

    @property
    def pool_seconds(self) -> Floats:
        """[n] time that each still needs its memory, times the share of the pool that it holds."""
        share = self._problem.running.num_units / self._problem.num_units
        seconds: Floats = share * self.tokens_to_come * self.step_seconds
        return seconds

    @property
    def anew_seconds(self) -> Floats:
        """[n] time to compute each cache anew, if it were lost."""
        num_tokens = self._problem.running.num_computed_tokens
        return prompt_seconds(self._problem.cost, np.zeros_like(num_tokens), num_tokens)

    @property
    def waiting_costs(self) -> Floats:
        """[n] what it costs to serve each of the waiting requests, as :attr:`costs`."""
        to_come = self._everybodys_tokens_to_come[len(self._problem.running) :]
        return self._costs(self.first_units, self.first_tiers, to_come) * self.waiting_weights

    @computed_once
    def waiting_weights(self) -> Floats:
        """[n] how much costs of each count: half per priority."""
        weights: Floats = np.exp2(-self._problem.waiting.priorities)
        return weights

    @computed_once
    def costs(self) -> Floats:
        """[n] what it costs to let each go on: unit-tokens until the end, halved per priority.

        A unit-token is a unit held while a token is made. What a request holds counts in full,
        what it will grow by half, as it comes little by little.
        """
        running = self._problem.running
        costs: Floats = self._costs(running.num_units, running.tiers, self.tokens_to_come)
        costs *= np.exp2(-running.priorities)
        return costs

    def _costs(self, num_units: Ints, tiers: Tiers, to_come: Floats) -> Floats:
        costs: Floats = to_come * (num_units + 0.5 * to_come * self._units_per_token[tiers])
        return costs

    @computed_once
    def _everybodys_tokens_to_come(self) -> Floats:
        """[n] of the running, then of the waiting. Who asks for one mostly asks for the other, and
        asking history twice takes nearly twice as long."""
        groups = self._problem.running, self._problem.waiting
        num_output = np.concatenate([group.num_output_tokens for group in groups])
        num_prompt = np.concatenate([group.num_prompt_tokens for group in groups])
        most = np.concatenate([group.max_num_tokens for group in groups]) - num_prompt - num_output
        expected = self._history.remaining(num_output, num_prompt, most)
        guess = np.concatenate([group.expected_output_tokens for group in groups])
        if not np.count_nonzero(guess):
            return expected
        return np.where(guess > 0, np.clip(guess - num_output, 1, np.maximum(most, 1)), expected)

    # Memory

    @computed_once
    def least_first_units(self) -> int:
        """Units that the shortest of the waiting requests takes at least to start."""
        num_tokens = int(np.minimum.reduce(self._problem.waiting.num_tokens)) + 1
        return -(-num_tokens // self._problem.block_size) * self.rates.compact.units_per_block

    @computed_once
    def first_units(self) -> Ints:
        """[n] units of the waiting requests, in the tiers they start in, with their first token."""
        return self.units_for(self._problem.waiting.num_tokens + 1, self.first_tiers)

    @computed_once
    def first_tiers(self) -> Tiers:
        """[n] tier in which each of the waiting requests starts.

        Compact when memory is short and the longer steps cost less than the share of one request
        in a step is worth, or when KV could not hold the request to its end.
        """
        problem, waiting, rates = self._problem, self._problem.waiting, self.rates
        tiers = np.full(len(waiting), int(rates.kv.tier), np.int8)
        if rates.compact is rates.kv:
            return tiers
        is_compact = ~problem.fits_pool(waiting, rates.kv)
        if not self._is_memory_plentiful():
            per_cached = rates.seconds_per_cached
            dearer = per_cached[rates.compact.tier] - per_cached[rates.kv.tier]
            per_request = self.step_seconds / max(1, self.num_decodes)
            is_compact |= dearer * waiting.num_tokens < per_request
        tiers[is_compact] = rates.compact.tier
        return tiers

    def _is_memory_plentiful(self) -> bool:
        """Whether all that wait would fit as keys and values, and everybody could grow a while."""
        problem, per_block = self._problem, self.rates.kv.units_per_block
        least_blocks = len(problem.waiting) * (_SOON_TOKENS // problem.block_size)
        if problem.num_free_units < least_blocks * per_block:
            return False
        num_blocks = problem.num_blocks(problem.waiting.num_tokens + _SOON_TOKENS)
        left = problem.num_free_units - per_block * int(np.add.reduce(num_blocks))
        return left >= 0 and left >= self.soon_units

    @computed_once
    def soon_units(self) -> int:
        """Units that the running requests will grow by in their next tokens."""
        soon = np.minimum(self.tokens_to_come, _SOON_TOKENS)
        return int(soon @ self._units_per_token[self._problem.running.tiers])

    def units_by(self, seconds: Floats, num_units_now: int, goes_on: Bools) -> Floats:
        """[n] units that will be there after so many seconds, never less than now.

        Each running request that ``goes_on`` ends at a constant rate, once in the time that its
        expected tokens take, and grows by a token a step.
        """
        running = self._problem.running
        lives = np.maximum(self.tokens_to_come[goes_on], 1.0) * self.step_seconds
        ended = -np.expm1(-_FORECAST_SECONDS[:, None] / lives)
        growth = (
            float(np.add.reduce(self._units_per_token[running.tiers[goes_on]])) / self.step_seconds
        )
        units = num_units_now + ended @ running.num_units[goes_on] - growth * _FORECAST_SECONDS
        units = np.maximum(units, float(num_units_now))
        return np.interp(np.maximum(seconds, 0.0), _FORECAST_SECONDS, units)
