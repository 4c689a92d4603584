"""How much time running decodes leave for prompts, by the cost model. KV caches only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Floats, Ints
from aptserve_scheduler.core.types import CostCoefficients, Tier
from aptserve_scheduler.policies.base import BatchProblem


def prompt_seconds(cost: CostCoefficients, num_computed: Ints, num_new: Ints | Floats) -> Floats:
    """[n] what computing so many tokens after those adds to an iteration."""
    seconds: Floats = (
        cost.seconds_per_sequence
        + cost.seconds_per_token * num_new
        + cost.seconds_per_attention_pair * num_new * (num_computed + 0.5 * num_new)
    )
    return seconds


@dataclass(frozen=True, slots=True)
class Pace:
    """An iteration of decodes: the time it takes, and the time it may take."""

    decode_seconds: float
    """Without any prompt."""
    slack_seconds: float
    """With prompts, so that no decode oversteps its objective; infinite if none can."""

    @classmethod
    def of(cls, problem: BatchProblem, rows: Ints) -> Pace:
        """Of the rows of ``running`` that decode."""
        cost, running = problem.cost, problem.running
        per_cached = cost.seconds_per_cached_token.get(Tier.KV, 0.0)
        decode_seconds = (
            cost.base_seconds
            + (cost.seconds_per_token + cost.seconds_per_sequence) * len(rows)
            + per_cached * float(running.num_computed_tokens[rows].sum())
        )
        # Behind a plan in flight, this iteration starts when that one's token has come.
        num_known = running.num_prompt_tokens[rows] + running.num_output_tokens[rows]
        waits = np.where(running.num_tokens[rows] > num_known, 0.0, running.pending_seconds[rows])
        slack = running.tbt_seconds[rows] - waits
        counts = (running.miss_after_seconds[rows] >= 0) & (slack >= decode_seconds)
        return cls(decode_seconds, float(slack[counts].min(initial=np.inf)))

    def num_tokens(self, cost: CostCoefficients, num_computed: Ints, num_remaining: Ints) -> int:
        """Prompt tokens, taken in turn from prompts in this order, that the slack allows."""
        left = self.slack_seconds - self.decode_seconds
        ends = np.cumsum(prompt_seconds(cost, num_computed, num_remaining))
        num_whole = int(np.searchsorted(ends, left, side="right"))
        num_tokens = int(num_remaining[:num_whole].sum())
        if num_whole == len(ends):
            return num_tokens
        left -= float(ends[num_whole - 1]) if num_whole else 0.0
        left -= cost.seconds_per_sequence
        if left <= 0:
            return num_tokens
        # left = linear n + pair n^2 / 2, solved for n without cancellation
        pair = cost.seconds_per_attention_pair
        linear = cost.seconds_per_token + pair * int(num_computed[num_whole])
        return num_tokens + int(2 * left / (linear + np.sqrt(linear**2 + 2 * pair * left)))

    def stretch(self, cost: CostCoefficients, least_tokens: int, most_tokens: int) -> float:
        """Seconds that pass for each second spent on prompts of ``least`` to ``most`` tokens."""
        per_token = cost.seconds_per_token
        spent = min(self.slack_seconds - self.decode_seconds, most_tokens * per_token)
        spent = max(spent, least_tokens * per_token)
        return 1.0 + self.decode_seconds / spent if spent > 0 else 1.0
