"""From logits to tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from aptserve_worker.plan import Logprobs, Sampling
from aptserve_worker.sampling.random import uniform
from aptserve_worker.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; ``logprobs`` when asked for."""

    token_id: int
    logprobs: Logprobs | None = None


def sample(logits: Tensor, sequences: Seq[Sequence], eos: Seq[int]) -> list[Sampled | None]:
    """The next token of each sequence; None where its logits hold no finite maximum.

    ``logits``: ``[len(sequences), vocab_size]`` float32. Rows do not influence one another.
    """
    if not sequences:
        return []
    best, arg_best = logits.max(dim=-1)
    # NaN wins every maximum, so one look at the maximum tells whether a row is sound.
    sound = best.isfinite().tolist()
    greedy = arg_best.tolist()
    chosen: list[Sampled | None] = []
    for i, sequence in enumerate(sequences):
        if not sound[i]:
            chosen.append(None)
        elif is_plain_greedy(sequence, eos):
            chosen.append(Sampled(greedy[i]))
        else:
            chosen.append(_sample_row(logits[i], sequence, eos))
    return chosen


def is_plain_greedy(sequence: Sequence, eos: Seq[int]) -> bool:
    """Whether the most likely token is the answer, with nothing else asked for."""
    s = sequence.sampling
    return (
        s.temperature == 0.0
        and s.num_logprobs is None
        and not s.logit_bias
        and s.repetition_penalty == 1.0
        and s.presence_penalty == 0.0
        and s.frequency_penalty == 0.0
        and not _forbidden(sequence, eos)
    )


def _sample_row(row: Tensor, sequence: Sequence, eos: Seq[int]) -> Sampled | None:
    # Rows with wishes of their own are few; they are worked on where small operations are cheap.
    row = _adjust(row.to("cpu", copy=True), sequence, eos)
    if not bool(row.max().isfinite()):
        return None
    s = sequence.sampling
    if s.temperature == 0.0:
        token = int(row.argmax())
    else:
        token = _draw(row, s, uniform(s.seed, sequence.num_output_tokens))
    return Sampled(token, _logprobs(row, token, s.num_logprobs))


def _adjust(row: Tensor, sequence: Sequence, eos: Seq[int]) -> Tensor:
    """Penalties, bias and forbidden tokens; in place."""
    s = sequence.sampling
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)))
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / s.repetition_penalty, values * s.repetition_penalty
        )
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(sequence.output_token_ids)
        if counts:
            tokens = torch.tensor(list(counts))
            times = torch.tensor(list(counts.values()), dtype=row.dtype)
            row[tokens] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        row[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()))
    forbidden = _forbidden(sequence, eos)
    if forbidden:
        row[torch.tensor(forbidden)] = float("-inf")
    return row


def _forbidden(sequence: Sequence, eos: Seq[int]) -> list[int]:
    """Tokens that would end the sequence before ``min_tokens``."""
    s = sequence.sampling
    if sequence.num_output_tokens >= s.min_tokens:
        return []
    return sorted({*s.stop_token_ids, *(() if s.ignore_eos else eos)})


def _draw(row: Tensor, s: Sampling, u: float) -> int:
    """Invert the distribution of the tokens that the filters leave, at ``u`` in [0, 1)."""
    scaled = row / s.temperature
    if s.top_k or s.top_p < 1.0:
        values, tokens = _best(scaled, s.top_k)
        probabilities = values.softmax(-1, dtype=torch.float64)
        before = probabilities.cumsum(-1) - probabilities
        keep = before < s.top_p  # the first token always stays
        keep &= probabilities >= s.min_p * probabilities[0]
        probabilities = probabilities[keep]
        return int(tokens[_invert(probabilities, u)])
    probabilities = scaled.softmax(-1, dtype=torch.float64)
    if s.min_p > 0.0:
        probabilities[probabilities < s.min_p * probabilities.max()] = 0.0
    return _invert(probabilities, u)


def _best(scaled: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Logits and tokens, best first; ties in token order, whatever the batch."""
    values, tokens = scaled.sort(descending=True, stable=True)
    if 0 < top_k < values.shape[0]:
        return values[:top_k], tokens[:top_k]
    return values, tokens


def _invert(probabilities: Tensor, u: float) -> int:
    cumulative = probabilities.cumsum(-1)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    # Rounding may point past the last token that has any probability.
    return min(index, int(probabilities.nonzero()[-1]))


def _logprobs(row: Tensor, token: int, num_top: int | None) -> Logprobs | None:
    if num_top is None:
        return None
    values = row.log_softmax(-1)
    best = values.topk(min(num_top, values.shape[0]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprobs((token, float(values[token])), top)
