"""Length models of well-known workloads, for machines without their data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from aptserve.workload.operations import Clipping, Stream, clipped, generator
from aptserve.workload.trace import Floats, Ints, Lengths

_MIN_ROUND = 1000
_MAX_ROUNDS = 100
"""Rounds of draws, each as large as what is wanted, before a context is said to be too small."""


class Quantiles:
    """A distribution of token counts given by its quantiles.

    The logarithm of the count is linear in the normal score between two quantiles, so two of them
    make a log-normal distribution. Beyond the first and the last the count stays at theirs.
    """

    def __init__(self, tokens_at: Mapping[float, float]) -> None:
        normal = NormalDist()
        self._scores = np.array([normal.inv_cdf(level) for level in tokens_at])
        self._log_tokens = np.log(np.array(list(tokens_at.values())))

    def tokens(self, scores: Floats) -> Ints:
        """Counts [n], at least 1, at these standard normal scores [n]."""
        counts: Floats = np.rint(np.exp(np.interp(scores, self._scores, self._log_tokens)))
        return np.maximum(counts, 1).astype(np.int64)


@dataclass(frozen=True)
class LengthModel:
    """Prompt and output lengths of a workload."""

    name: str
    prompts: Quantiles
    outputs: Quantiles
    correlation: float
    """Of the normal scores of prompt and output (a Gaussian copula)."""
    max_total_tokens: int
    clipping: Clipping
    """A draw over the limit is ``drop``-ped and drawn again, or has its prompt ``cut``."""

    def draw(self, num_requests: int, seed: int, max_total_tokens: int | None = None) -> Lengths:
        """Lengths of ``num_requests``, equal for an equal seed.

        ``max_total_tokens`` narrows the model's own limit on prompt and output together.
        ValueError when it leaves hardly anything of the model.
        """
        if num_requests < 1:
            raise ValueError(f"num_requests: must be at least 1, not {num_requests}")
        limit = self.max_total_tokens
        if max_total_tokens is not None:
            limit = min(limit, max_total_tokens)
        rng = generator(seed, Stream.LENGTHS)
        if self.clipping == "cut":
            prompts, outputs = self._draw(num_requests, rng)
            note = "synthetic lengths"
        else:
            prompts, outputs = self._draw_within(limit, num_requests, rng)
            note = f"synthetic lengths within {limit:,} tokens"
        return clipped(Lengths(self.name, prompts, outputs, note), limit, self.clipping)

    def _draw_within(self, limit: int, n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        kept = np.empty((2, 0), np.int64)
        for _ in range(_MAX_ROUNDS):
            drawn = np.stack(self._draw(max(n, _MIN_ROUND), rng))
            kept = np.concatenate([kept, drawn[:, drawn.sum(axis=0) <= limit]], axis=1)
            if kept.shape[1] >= n:
                return kept[0, :n], kept[1, :n]
        raise ValueError(f"max_total_tokens: {limit} leaves hardly any request of {self.name}")

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        prompt_scores, independent = rng.standard_normal((2, n))
        rest = math.sqrt(1 - self.correlation**2)
        output_scores = self.correlation * prompt_scores + rest * independent
        return self.prompts.tokens(prompt_scores), self.outputs.tokens(output_scores)


SHAREGPT = LengthModel(
    "sharegpt",
    prompts=Quantiles(
        {0.001: 4, 0.01: 7, 0.05: 11, 0.1: 15, 0.2: 22, 0.3: 31, 0.4: 44, 0.5: 61}
        | {0.6: 90, 0.7: 136, 0.8: 228, 0.9: 488, 0.95: 830, 0.99: 1416, 0.999: 1682}
    ),
    outputs=Quantiles(
        {0.001: 4, 0.01: 13, 0.05: 41, 0.1: 72, 0.2: 183, 0.3: 314, 0.4: 396, 0.5: 473}
        | {0.6: 557, 0.7: 636, 0.8: 742, 0.9: 870, 0.95: 935, 0.99: 1003, 0.999: 1022}
    ),
    correlation=0.055,
    max_total_tokens=2048,
    clipping="drop",
)
"""First turns of ShareGPT conversations: prompt and answer of 4 tokens and more, 2,048 together.

*Fitted* to 5,451 first turns among the ShareGPT turns that Sarathi-Serve's artefact publishes
(Llama-2 tokenizer; a turn is a first one when its input does not hold the turn before). They have,
as mean / P10 / P50 / P90 / P99, prompts of 163 / 15 / 60 / 457 / 1,218 tokens, outputs of
471 / 71 / 470 / 865 / 1,002, and a rank correlation of 0.05; draws within 2,048 tokens reproduce
these to about 1 %, which is why the quantiles above lie a little higher. That data ends at 1,024
output tokens. Other cuts of ShareGPT differ: means of about 160 and 340 are often quoted for its
pairs.
"""

HUMANEVAL = LengthModel(
    "humaneval",
    prompts=Quantiles({0.01: 55, 0.1: 85, 0.5: 150, 0.9: 275, 0.99: 420}),
    outputs=Quantiles({0.01: 10, 0.1: 20, 0.5: 52, 0.9: 130, 0.99: 250}),
    correlation=0.3,
    max_total_tokens=2048,
    clipping="drop",
)
"""HumanEval: the 164 function headers with docstrings, answered by their canonical solutions.

*An assumption, not a fit*, made without the data: prompts of about 50 to 400 tokens (mean 167) and
solutions of about 10 to 250 (mean 65), the order of magnitude known of the set under GPT-2-like
tokenizers, OPT's among them. That longer tasks have somewhat longer solutions is assumed as well.
Every task is equally likely, so asking each ten times changes nothing here.
"""

LONGBENCH = LengthModel(
    "longbench",
    prompts=Quantiles({0.01: 600, 0.1: 1300, 0.5: 1800, 0.9: 1950, 0.99: 2010}),
    outputs=Quantiles({0.01: 35, 0.1: 80, 0.5: 150, 0.9: 300, 0.99: 500}),
    correlation=0.0,
    max_total_tokens=2048,
    clipping="cut",
)
"""Summarisation sets of LongBench in a context of 2,048 tokens.

*An assumption, not a fit*: most documents are longer than the context and were shortened to nearly
fill it; what then exceeds it is cut (prompts: mean about 1,640, median 1,740). Summaries follow the
body of the arXiv summarisation outputs that Vidur's artefact publishes (within 2,048 tokens: median
148, P90 324) without its tail of P99 1,500, taken for unlike LongBench's (mean 172 here).
"""

LENGTH_MODELS = {model.name: model for model in (SHAREGPT, HUMANEVAL, LONGBENCH)}
"""The models by name."""
